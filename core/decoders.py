"""Decode one stream of a file to samples [frames, channels], within limits; what decoders raise becomes
AudioError."""

from __future__ import annotations

from typing import Literal

import numpy as np
import soundfile

from core import ffmpeg
from core.audio_limits import AudioError, Limits, Piece, words_of
from core.containers import BytesSource, Source, Stream, StreamInfo, stream_info

# No codec packs more frames into a byte (silence in FLAC: about 3,000). A header that declares more is not
# believed: what the file holds is then decoded block by block.
_MAX_FRAMES_PER_BYTE = 4096
_BLOCK = 1 << 20  # frames
# Frames to decode before a place in the middle, where a decoder starts with wrong samples: libmpg123 without
# the bits that earlier MPEG frames hold for later ones (at most 511 bytes, 32 small frames), libvorbis
# without the overlapping block.
_PREROLL = {"MPEG_LAYER_III": 32 * 1152, "VORBIS": 8192}

DType = Literal["native", "float32"]  # native: int16 where the source has 16 bits or fewer, else float32


def to_float(samples: np.ndarray) -> np.ndarray:
    """int16 to float32 of full scale 1; float32 as it is."""
    return samples if samples.dtype == np.float32 else samples.astype(np.float32) / np.float32(32768)


class Pcm16:
    """16-bit PCM of a WAV: its bytes are the samples."""

    container, subtype, exact = "WAV", "PCM_16", True

    def __init__(self, source: Source, stream: Stream):
        self._source, self._begin = source, stream.begin
        self._kind = np.dtype(np.int16).newbyteorder(stream.order)
        assert stream.frames is not None  # such a stream has its size in its header
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
            raise AudioError(
                "undecodable", "its header tells no length, or an impossible one: write it again"
            )
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
            return _flac_of_unknown_length(source, stream, info, exact, limits)._replace(
                subtype=subtype, promised=promised
            )
        limits.check(promised, info.rate, info.channels, 2 if exact else 4)
        fast = _by_miniaudio("flac", source, stream, exact)
        if fast and len(fast.samples) == promised:
            limits.add(promised, info.rate, info.channels, 2 if exact else 4)
            return fast._replace(subtype=subtype)
    try:
        sound = Sound(source, stream)
        return Piece(
            sound.read_to_end(dtype, limits), sound.rate, sound.container, sound.subtype, promised, 0.0
        )
    except soundfile.LibsndfileError:
        if not fast or not len(fast.samples):
            raise
        return fast._replace(promised=promised, slack=0.0)


def _flac_of_unknown_length(
    source: Source, stream: Stream, info: StreamInfo, exact: bool, limits: Limits
) -> Piece:
    """FLAC that was written to a pipe, block by block."""
    import miniaudio

    form, dtype = (
        (miniaudio.SampleFormat.SIGNED16, np.int16) if exact else (miniaudio.SampleFormat.FLOAT32, np.float32)
    )
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
