"""Decode one stream of a file to samples [frames, channels], within limits; what decoders raise becomes AudioError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import soundfile

from core.console import OneLine
from core.containers import BytesSource, NotAFile, Source, Stream, StreamInfo, stream_info

MAX_SECONDS = 4 * 3600.0
#: Most bytes of one clip's decoded samples: frames x channels x bytes a sample.
MAX_DECODED_BYTES = 1 << 31
# No codec packs more frames into a byte (silence in FLAC: about 3,000). A header that promises more is not believed: what the
# file holds is then decoded block by block.
_MAX_FRAMES_PER_BYTE = 4096
_BLOCK = 1 << 20  # frames
# Frames to decode before a place in the middle, where a decoder starts with wrong samples: libmpg123 without the bits that
# earlier MPEG frames hold for later ones (at most 511 bytes, 32 small frames), libvorbis without the overlapping block.
_PREROLL = {"MPEG_LAYER_III": 32 * 1152, "VORBIS": 8192}

Reason = Literal[
    "missing_file",  # no such file
    "unreadable",  # the file system refuses it, or it is a folder, FIFO or device
    "undecodable",  # no decoder reads it
    "no_decoder",  # needs an optional package; the text names the command
    "zero_length",  # no samples, or none in the segment
    "truncated",  # it is cut: the text says what is missing
    "not_finite",  # NaN or infinity
    "too_long",  # more than max_seconds
    "too_large",  # more bytes than allowed, in the file or decoded; or there is no memory for it
    "odd_rate",  # a rate that cannot be resampled or encoded
]
DType = Literal["native", "float32"]  # native: int16 where the source has 16 bits or fewer, else float32


class AudioError(OneLine, ValueError):
    """Audio that cannot be used. str() is one line; `reason` a fixed word; `seconds` its length if known."""

    def __init__(self, reason: Reason, detail: str, seconds: float | None = None):
        super().__init__(detail)
        self.reason, self.seconds = reason, seconds


@contextmanager
def typed_errors(name: str = "") -> Iterator[None]:
    """Turn whatever reading and decoding raise into AudioError; its text begins with `name`."""
    prefix = f"{name}: " if name else ""
    try:
        yield
    except AudioError as error:
        raise AudioError(error.reason, f"{prefix}{error}", error.seconds) from None
    except FileNotFoundError:
        raise AudioError("missing_file", f"{prefix}does not exist") from None
    except NotAFile as error:
        raise AudioError("unreadable", f"{prefix}{error}") from None
    except OSError as error:
        raise AudioError("unreadable", f"{prefix}{error.strerror or error}") from None
    except MemoryError:
        raise AudioError("too_large", f"{prefix}there is not enough memory to decode it") from None
    except soundfile.LibsndfileError as error:
        raise AudioError("undecodable", prefix + words_of(error)) from None
    except Exception as error:  # decoders raise RuntimeError, ValueError, OverflowError, struct.error, and errors of their own
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise AudioError("undecodable", f"{prefix}{line} ({type(error).__name__})") from None


def words_of(error: soundfile.LibsndfileError) -> str:
    """libsndfile's own words, in one line."""
    return " ".join(error.error_string.split()).removeprefix("Error : ").strip(" .") or "libsndfile gives no reason"


class Limits:
    """What one clip may cost: seconds, and bytes of decoded samples. Checked by its header, then while it is decoded."""

    def __init__(self, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_DECODED_BYTES):
        self.max_seconds, self.max_bytes = max_seconds, max_bytes
        self._seconds, self._bytes = 0.0, 0

    def check(self, frames: int, rate: int, channels: int, width: int) -> tuple[float, int]:
        """Return (seconds, bytes) with `frames` more, a sample being `width` bytes. Errors: AudioError too_long | too_large."""
        seconds, size = self._seconds + frames / rate, self._bytes + frames * channels * width
        if seconds > self.max_seconds:
            raise AudioError("too_long", f"{seconds:.3f} s, more than {self.max_seconds:g}", seconds)
        if size > self.max_bytes:
            what = f"{seconds:.3f} s of {channels} channel{'s' * (channels > 1)} at {rate:,} Hz"
            raise AudioError("too_large", f"{what} are {size:,} bytes decoded, more than {self.max_bytes:,}", seconds)
        return seconds, size

    def add(self, frames: int, rate: int, channels: int, width: int) -> None:
        """Count decoded frames. Errors: as `check`."""
        self._seconds, self._bytes = self.check(frames, rate, channels, width)


class Piece(NamedTuple):
    """One decoded stream."""

    samples: np.ndarray  # [frames, channels] int16 or float32
    rate: int
    container: str  # libsndfile's name, or FFmpeg's
    subtype: str
    promised: int | None = None  # frames by its header, None where it does not tell them
    slack: float = 0.05  # seconds that a lossy codec's promise may differ by
    is_cut: str = ""  # why it is known to be cut

    def missing(self) -> str:
        """What is missing of what the header promises, for people; "" for nothing."""
        if self.promised is not None and len(self.samples) < self.promised - self.slack * self.rate:
            there, promised = len(self.samples) / self.rate, self.promised / self.rate
            return f"its header promises {promised:.3f} s, {there:.3f} s can be decoded"
        return self.is_cut


def to_float(samples: np.ndarray) -> np.ndarray:
    """int16 to float32 of full scale 1; float32 as it is."""
    return samples if samples.dtype == np.float32 else samples.astype(np.float32) / np.float32(32768)


class Pcm16:
    """16-bit PCM of a WAV: its bytes are the samples."""

    container, subtype, exact = "WAV", "PCM_16", True

    def __init__(self, source: Source, stream: Stream):
        self._source, self._begin = source, stream.begin
        self._kind = np.dtype(np.int16).newbyteorder(stream.order)
        self.rate, self.channels, self.frames = stream.rate, stream.channels, stream.frames

    def read(self, first: int, count: int, dtype: DType) -> np.ndarray:
        offset, step = self._begin + first * 2 * self.channels, 2 * self.channels
        if isinstance(self._source, BytesSource):
            values = np.frombuffer(self._source.data, self._kind, count * self.channels, offset)
        else:
            data = self._source.read(offset, count * step)
            values = np.frombuffer(data, self._kind, len(data) // step * self.channels)
        samples = values.reshape(-1, self.channels).astype(np.int16, copy=False)
        return samples if dtype == "native" else to_float(samples)


class Sound:
    """A stream that libsndfile decodes. Errors: LibsndfileError."""

    def __init__(self, source: Source, stream: Stream):
        self.file = soundfile.SoundFile(stream.open(source))
        self.rate, self.channels, self.frames = self.file.samplerate, self.file.channels, self.file.frames
        self.container, self.subtype = self.file.format, self.file.subtype
        self.exact = self.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        self.is_believable = _is_believable(self.frames, source)

    def _type(self, dtype: DType) -> str:
        return "int16" if dtype == "native" and self.exact else "float32"

    def read(self, first: int, count: int, dtype: DType) -> np.ndarray:
        before = min(first, _PREROLL.get(self.subtype, 0))
        self.file.seek(first - before)
        return self.file.read(before + count, dtype=self._type(dtype), always_2d=True)[before:]

    def read_to_end(self, dtype: DType, limits: Limits) -> np.ndarray:
        kind = self._type(dtype)
        shape = self.rate, self.channels, np.dtype(kind).itemsize
        if not self.is_believable:
            raise AudioError("undecodable", "its header tells no length, or an impossible one: write it again")
        limits.check(self.frames, *shape)
        samples = self.file.read(self.frames, dtype=kind, always_2d=True)
        limits.add(len(samples), *shape)
        return samples


class Whole:
    """A recording that was decoded from its beginning to its end, for reading segments."""

    def __init__(self, piece: Piece):
        self._samples, self.rate, self.container, self.subtype = piece[:4]
        self.frames, self.channels = self._samples.shape
        self.exact = self._samples.dtype == np.int16

    def read(self, first: int, count: int, dtype: DType) -> np.ndarray:
        samples = self._samples[first : first + count]
        return samples if dtype == "native" else to_float(samples)


def _is_believable(frames: int, source: Source) -> bool:
    return 0 <= frames <= _MAX_FRAMES_PER_BYTE * source.size + 65536


def decode_stream(source: Source, stream: Stream, dtype: DType, limits: Limits) -> Piece:
    """Decode a stream to its end. Errors: AudioError; LibsndfileError and others, for `typed_errors`."""
    if stream.is_pcm16:
        part = Pcm16(source, stream)
        limits.add(part.frames, part.rate, part.channels, 2 if dtype == "native" else 4)
        return Piece(part.read(0, part.frames, dtype), part.rate, part.container, part.subtype)
    if stream.kind == "flac":
        return _flac(source, stream, dtype, limits)
    from core import ffmpeg  # here: it imports this module

    refusal = ffmpeg.name_of(source.read(stream.begin, 16))
    if refusal is None:
        try:
            sound = Sound(source, stream)
        except soundfile.LibsndfileError as error:
            refusal = words_of(error)
    if refusal is not None:
        return ffmpeg.decode_file(stream.open(source), limits, refusal)
    if stream.kind == "mp3" and stream.frames not in (None, sound.frames):
        return _mp3(source, stream, limits)
    samples = sound.read_to_end(dtype, limits)
    promised = sound.frames if sound.is_believable else None
    return Piece(samples, sound.rate, sound.container, sound.subtype, promised)


def _flac(source: Source, stream: Stream, dtype: DType, limits: Limits) -> Piece:
    """FLAC by dr_flac: the samples of libFLAC in 0.6 of its time.

    dr_flac leaves out damaged frames, so its result counts only where it is as long as the header says.
    """
    info = stream_info(source.read(stream.begin, 26))
    fast, promised = None, info.frames or None if info else None
    if info and info.rate:
        exact = info.bits <= 16 and dtype == "native"
        subtype = f"PCM_{info.bits}" if info.bits > 8 else "PCM_S8"
        if promised is None or not _is_believable(promised, source):
            return _flac_of_unknown_length(source, stream, info, exact, limits)._replace(subtype=subtype, promised=promised)
        limits.check(promised, info.rate, info.channels, 2 if exact else 4)
        fast = _by_miniaudio("flac", source, stream, exact)
        if fast and len(fast.samples) == promised:
            limits.add(promised, info.rate, info.channels, 2 if exact else 4)
            return fast._replace(subtype=subtype)
    try:
        sound = Sound(source, stream)
        return Piece(sound.read_to_end(dtype, limits), sound.rate, sound.container, sound.subtype, promised, 0.0)
    except soundfile.LibsndfileError:
        if not fast or not len(fast.samples):
            raise
        return fast._replace(promised=promised, slack=0.0)


def _flac_of_unknown_length(source: Source, stream: Stream, info: StreamInfo, exact: bool, limits: Limits) -> Piece:
    """FLAC that was written to a pipe, block by block."""
    import miniaudio

    form, dtype = (miniaudio.SampleFormat.SIGNED16, np.int16) if exact else (miniaudio.SampleFormat.FLOAT32, np.float32)
    data = source.read(stream.begin, stream.end - stream.begin)
    try:
        blocks = []
        for block in miniaudio.stream_memory(data, form, info.channels, info.rate, frames_to_read=_BLOCK):
            samples = np.frombuffer(block, dtype).reshape(-1, info.channels)
            limits.add(len(samples), info.rate, info.channels, samples.itemsize)
            blocks.append(samples)
    except miniaudio.DecodeError as error:
        raise AudioError("undecodable", f"FLAC without a length: {error}") from None
    return Piece(np.concatenate(blocks), info.rate, "FLAC", "", slack=0.0)


def _mp3(source: Source, stream: Stream, limits: Limits) -> Piece:
    """MP3 by dr_mp3, which decodes all of it; libsndfile stops where it guesses the end to be."""
    fast = _by_miniaudio("mp3", source, stream, False)
    if fast is None:
        raise AudioError("undecodable", "dr_mp3 cannot decode it")
    limits.add(len(fast.samples), fast.rate, fast.samples.shape[1], 4)
    return fast._replace(subtype="MPEG_LAYER_III")


def _by_miniaudio(codec: Literal["flac", "mp3"], source: Source, stream: Stream, exact: bool) -> Piece | None:
    import miniaudio  # here: it takes 0.1 s to import, and a corpus of WAV does not need it

    decoder = getattr(miniaudio, f"{codec}_read_{'s16' if exact else 'f32'}")
    try:
        sound = decoder(source.read(stream.begin, stream.end - stream.begin))
    except miniaudio.DecodeError:
        return None
    samples = np.frombuffer(sound.samples, np.int16 if exact else np.float32).reshape(-1, sound.nchannels)
    return Piece(samples, sound.sample_rate, codec.upper(), "")
