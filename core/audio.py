"""Decode audio: the one way from a file or its bytes to samples, for packing, training, evaluation and the
web demo.

    bytes or path -> containers (streams, what headers promise) -> decoder -> [frames, channels] -> mono ->
    target rate

The decoded length is the truth: every stream is decoded to its end, and what a header declares beyond that is
a `cut`. Decoders: 16-bit WAV as it is; FLAC by dr_flac, by libFLAC where dr_flac decodes less than the header
declares; MP3 whose length no header tells by dr_mp3; everything else by libsndfile; what libsndfile does not
know (AAC, MP4, WebM, WMA, AMR) by PyAV where it is installed (core/ffmpeg.py). Resampling is soxr's.

Errors are `AudioError` with a fixed `reason`. What else was noticed is a list of `Finding`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import soundfile

from core import ffmpeg
from core.audio_limits import MAX_DECODED_BYTES, MAX_SECONDS, AudioError, Limits, Piece, typed_errors
from core.containers import BytesSource, FileSource, FindingKind, Source, locate, open_regular
from core.decoders import DType, Pcm16, Sound, Whole, decode_stream, to_float

SAMPLE_RATE = 16_000  # of the model
#: File name extensions of audio. What a file is, is found by its content; these tell which members and files
# to open.
EXTENSIONS = tuple(
    "wav flac mp3 opus ogg oga aiff aif aifc au snd caf w64 sph m4a mp4 aac webm mka mkv wma amr 3gp mov "
    "wv".split()
)
MAX_FILE_BYTES = 1 << 32  # of a file that is read whole
#: A segment may end this much after its recording (annotators round).
TOLERANCE_SECONDS = 0.25


#: Kinds for which whole audio can be refused; what is cut is an error unless the caller asks for it.
REFUSABLE: tuple[FindingKind, ...] = (
    "no_end",
    "damaged",
    "trailing",
    "joined",
    "antiphase",
    "silent",
    "clipped",
)


class Finding(NamedTuple):
    """Something that a user should know about audio that was decoded all the same."""

    kind: FindingKind
    detail: str  # one line


@dataclass(frozen=True)
class Audio:
    """Decoded audio. samples: [frames, channels] as read, [frames] once mixed to mono; int16 (full scale
    32768) or float32."""

    samples: np.ndarray
    rate: int
    container: str = ""  # libsndfile's name, or FFmpeg's: WAV, FLAC, MP3, OGG, mov
    subtype: str = ""  # PCM_16, VORBIS, OPUS, aac
    findings: tuple[Finding, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def decode(
    source: bytes | str | os.PathLike,
    *,
    start: float | None = None,
    duration: float | None = None,
    rate: int | None = SAMPLE_RATE,
    dtype: Literal["int16", "float32"] = "float32",
    whole: bool = True,
    levels: bool = True,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_DECODED_BYTES,
) -> Audio:
    """Decode a file, or its bytes, to mono samples [frames] at `rate` (None: the source's).

    start, duration: seconds; with a start only the segment [start, start + duration) is decoded. whole: audio
    that is cut is an error (truncated); False returns what there is, with a `cut` finding. levels: also look
    for silence and clipping. Channels are averaged. 16-bit mono at `rate` keeps its exact values in either
    dtype. Errors: AudioError.
    """
    native: DType = "float32" if dtype == "float32" else "native"
    audio = read(
        source,
        start=start,
        duration=duration,
        dtype=native,
        whole=whole,
        max_seconds=max_seconds,
        max_bytes=max_bytes,
    )
    return to_mono(audio, rate, dtype, levels=levels)


def read(
    source: bytes | str | os.PathLike,
    *,
    start: float | None = None,
    duration: float | None = None,
    dtype: DType = "native",
    whole: bool = True,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_DECODED_BYTES,
) -> Audio:
    """Decode to samples [frames, channels] at the source's rate. dtype native: int16 where the source has 16
    bits or fewer.

    The other arguments and the errors are those of `decode`.
    """
    recording = Recording(read_file(source) if start is None and not isinstance(source, bytes) else source)
    return recording.read(
        start, duration, dtype=dtype, whole=whole, max_seconds=max_seconds, max_bytes=max_bytes
    )


def largest_decoded(seconds: float) -> int:
    """Bytes that a clip of at most `seconds` may take decoded where anybody may send one: 8 channels at 48
    kHz, in float32."""
    return int(seconds * 8 * 48_000 * 4)


def read_file(path: str | os.PathLike, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return a regular file's bytes. Errors: AudioError missing_file | unreadable | too_large."""
    with typed_errors(), os.fdopen(open_regular(path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise AudioError(
                "too_large",
                f"{size:,} bytes, a whole file may have {max_bytes:,}: give segments of it (offset)",
            )
        return file.read()


class Recording:
    """A file, or its bytes, open for decoding whole or in segments.

    Of a path, which is opened for segments, only headers and the segment are read, as far as its format
    allows.
    """

    def __init__(self, source: bytes | str | os.PathLike):
        with typed_errors():
            self._source: Source = BytesSource(source) if isinstance(source, bytes) else FileSource(source)
            if self._source.size == 0:
                raise AudioError("zero_length", "the file is empty")
            self._layout = locate(self._source)
            self._part: Pcm16 | Sound | None = None
            self._decoded: Whole | None = None  # a recording that cannot be decoded in part

    def read(
        self,
        start: float | None = None,
        duration: float | None = None,
        *,
        dtype: DType = "native",
        whole: bool = True,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_DECODED_BYTES,
    ) -> Audio:
        """Decode all of it, or [start, start + duration). Arguments and errors are those of `decode`."""
        limits = Limits(max_seconds, max_bytes)
        with typed_errors():
            if start is None:
                piece, findings = self._whole(dtype, limits, whole)
            else:
                piece, findings = self._segment(start, duration, dtype, limits, whole)
            if not piece.subtype.startswith("PCM_"):
                _check_finite(piece.samples, piece.rate, start or 0.0)
        return Audio(piece.samples, piece.rate, piece.container, piece.subtype, tuple(findings))

    def seconds(self) -> float | None:
        """Return the length that its header declares, None where only decoding tells. Errors: AudioError."""
        with typed_errors():
            part = self._direct()
        return None if part is None else part.frames / part.rate

    def blocks(self, seconds: float) -> Iterator[Audio]:
        """Decode all of it in blocks [frames, channels] float32 of `seconds`, one after another.

        Memory holds one block, whatever the length, where the format allows that (of MP3 and Ogg, at the end,
        the file's own bytes too). The first block has the findings about the whole, the last one a `cut`.
        Joined files are decoded whole. Errors: AudioError, for a block that holds NaN or infinity too.
        """
        first, findings = 0, [Finding(kind, detail) for kind, detail in self._layout.noticed]
        if self._needs_ffmpeg():
            yield from self._ffmpeg_blocks(seconds, findings)
            return
        while True:
            with typed_errors():
                part = self._direct() or self._whole_recording()
                if first >= part.frames:
                    has_length = self._layout.streams[0].kind == "flac" and self._layout.streams[0].frames
                    if has_length or not self._parse_whole_file():
                        break
                    continue
                count = min(max(1, round(seconds * part.rate)), part.frames - first)
                samples = part.read(first, count, "float32")
                _check_finite(samples, part.rate, first / part.rate)
            first += len(samples)
            if len(samples) < count:
                ends, declared = first / part.rate, part.frames / part.rate
                findings.append(
                    Finding("cut", f"its header declares {declared:.3f} s, it ends at {ends:.3f} s")
                )
            yield Audio(samples, part.rate, part.container, part.subtype, tuple(findings))
            findings = []
            if len(samples) < count:
                break
        if first == 0:
            raise AudioError("zero_length", "holds no samples")

    def _needs_ffmpeg(self) -> bool:
        with typed_errors():
            streams = self._layout.streams
            head = self._source.read(streams[0].begin, 16) if len(streams) == 1 else b""
        return ffmpeg.name_of(head) is not None

    def _ffmpeg_blocks(self, seconds: float, findings: list[Finding]) -> Iterator[Audio]:
        with typed_errors():
            opened = self._layout.streams[0].open(self._source)
            pieces = ffmpeg.decode_blocks(opened, seconds, "")
        first = 0
        while True:
            with typed_errors():
                if (piece := next(pieces, None)) is None:
                    return
                samples = to_float(piece.samples)
                _check_finite(samples, piece.rate, first / piece.rate)
            first += len(samples)
            findings += [Finding("cut", piece.is_cut)] if piece.is_cut else []
            yield Audio(samples, piece.rate, piece.container, piece.subtype, tuple(findings))
            findings = []

    def _whole(self, dtype: DType, limits: Limits, refuse_cut: bool) -> tuple[Piece, list[Finding]]:
        findings = [Finding(kind, detail) for kind, detail in self._layout.noticed]
        if refuse_cut:
            _refuse_cut(findings)
        pieces = [decode_stream(self._source, stream, dtype, limits) for stream in self._layout.streams]
        if not any(finding.kind == "cut" for finding in findings):
            findings += [Finding("cut", detail) for piece in pieces if (detail := piece.missing())]
        if len(pieces) > 1:
            findings.append(Finding("joined", f"{len(pieces)} streams, one after another; all are decoded"))
        piece = _joined(pieces)
        if refuse_cut:
            _refuse_cut(findings, len(piece.samples) / piece.rate)
        if len(piece.samples) == 0:
            raise AudioError("zero_length", "holds no samples")
        return piece, findings

    def _segment(
        self, start: float, duration: float | None, dtype: DType, limits: Limits, refuse_cut: bool
    ) -> tuple[Piece, list[Finding]]:
        part = self._direct()
        if part is None or duration is None or (start + duration) * part.rate > part.frames:
            self._parse_whole_file()  # the header may promise too little
        try:
            return self._stretch(
                self._direct() or self._whole_recording(), start, duration, dtype, limits, refuse_cut
            )
        except soundfile.LibsndfileError:
            if not self._parse_whole_file():
                raise
        return self._stretch(
            self._direct() or self._whole_recording(), start, duration, dtype, limits, refuse_cut
        )

    @staticmethod
    def _stretch(
        part: Pcm16 | Sound | Whole,
        start: float,
        duration: float | None,
        dtype: DType,
        limits: Limits,
        refuse_cut: bool,
    ) -> tuple[Piece, list[Finding]]:
        first = round(min(start * part.rate, 2.0**62))
        if first >= part.frames:
            raise AudioError(
                "zero_length", f"has {part.frames / part.rate:.3f} s, nothing from {start:.3f} s on"
            )
        available = part.frames - first
        requested = available if duration is None else round(min(duration * part.rate, 2.0**62))
        if requested <= 0:
            raise AudioError("zero_length", f"a segment of {duration} s")
        limits.check(
            min(requested, available), part.rate, part.channels, 2 if dtype == "native" and part.exact else 4
        )
        samples = part.read(first, min(requested, available), dtype)
        findings = []
        if len(samples) < requested - TOLERANCE_SECONDS * part.rate:
            ends, requested_end = (first + len(samples)) / part.rate, (first + requested) / part.rate
            findings.append(Finding("cut", f"ends at {ends:.3f} s, its segment at {requested_end:.3f} s"))
            if refuse_cut:
                _refuse_cut(findings, len(samples) / part.rate)
        if len(samples) == 0:
            raise AudioError("zero_length", f"nothing can be decoded from {start:.3f} s on")
        return Piece(samples, part.rate, part.container, part.subtype), findings

    def _parse_whole_file(self) -> bool:
        """Look for joined streams, and count MP3 frames, where only headers were read so far; whether that is
        so."""
        if not isinstance(self._source, FileSource) or self._source.size > MAX_FILE_BYTES:
            return False
        if self._layout.streams[0].kind not in ("mp3", "ogg", "flac"):
            return False
        self._source = BytesSource(read_file(self._source.path))
        self._layout, self._part = locate(self._source), None
        return True

    def _whole_recording(self) -> Whole:
        if self._decoded is None:
            self._decoded = Whole(self._whole("native", Limits(), refuse_cut=False)[0])
        return self._decoded

    def _direct(self) -> Pcm16 | Sound | None:
        """Access to any place of a recording of one stream; None where it has to be decoded from its
        beginning."""
        if self._part is None and len(self._layout.streams) == 1:
            stream = self._layout.streams[0]
            if stream.is_pcm16:
                self._part = Pcm16(self._source, stream)
            else:
                try:
                    sound = Sound(self._source, stream)
                except soundfile.LibsndfileError:
                    return None
                if sound.is_believable and sound.file.seekable() and stream.frames in (None, sound.frames):
                    self._part = sound
        return self._part


def _refuse_cut(findings: list[Finding], seconds: float | None = None) -> None:
    for finding in findings:
        if finding.kind == "cut":
            raise AudioError("truncated", finding.detail, seconds)


def _check_finite(samples: np.ndarray, rate: int, start: float) -> None:
    # One NaN or infinity anywhere spoils the sum, which costs a fraction of looking at each sample.
    if samples.dtype == np.float32 and not np.isfinite(samples.sum(dtype=np.float64)):
        bad = int((~np.isfinite(samples)).any(axis=1).argmax())
        raise AudioError("not_finite", f"NaN or infinity at {start + bad / rate:.3f} s")


# --- joining, mixing, resampling ----------------------------------------------------------------------------


def _joined(pieces: list[Piece]) -> Piece:
    """Streams in order, as one: at the first one's rate, and as mono where they differ in channels."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    shapes = {(piece.rate, piece.samples.shape[1], piece.samples.dtype) for piece in pieces}
    parts = [piece.samples for piece in pieces]
    if len(shapes) > 1:
        parts = [to_float(part) for part in parts]
        if len({part.shape[1] for part in parts}) > 1:
            parts = [_mixed(part)[0][:, None] for part in parts]
        parts = [resample(part, piece.rate, first.rate) for part, piece in zip(parts, pieces, strict=True)]
    return first._replace(samples=np.concatenate(parts))


def to_mono(
    audio: Audio,
    rate: int | None = SAMPLE_RATE,
    dtype: Literal["int16", "float32"] = "float32",
    *,
    levels: bool = True,
) -> Audio:
    """Mix [frames, channels] to mono [frames] at `rate` (None: as it is). Errors: AudioError odd_rate |
    too_large."""
    target = rate or audio.rate
    findings = list(audio.findings)
    with typed_errors():
        if audio.samples.shape[1] == 1:
            wave = audio.samples[:, 0]
        else:
            wave, antiphase = _mixed(audio.samples)
            findings += [antiphase] if antiphase else []
        if levels:
            findings += _levels(audio.samples, wave)
        if target != audio.rate:
            wave = resample(to_float(wave), audio.rate, target)
            if len(wave) == 0:
                raise AudioError("zero_length", "nothing is left after resampling")
        if dtype == "float32":
            wave = to_float(wave)
        elif wave.dtype != np.int16:
            wave = to_int16(wave)
    return Audio(np.ascontiguousarray(wave), target, audio.container, audio.subtype, tuple(findings))


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float samples, full scale 1, to the nearest int16; louder ones are clipped."""
    with np.errstate(over="ignore"):
        return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


_CANCEL = 0.01  # of the channels' mean power is left in their mean: uncorrelated channels keep 1 / channels
_MIX_BLOCK = 1 << 20  # frames


def _mixed(samples: np.ndarray) -> tuple[np.ndarray, Finding | None]:
    """The mean of channels [frames] float32; where they cancel out (inverted phase), the loudest channel and
    a finding."""
    frames, channels = samples.shape
    if channels == 1:
        return to_float(samples[:, 0]), None
    mono, total, mixed_energy = np.empty(frames, np.float32), 0.0, 0.0
    with np.errstate(over="ignore"):  # floats may be of any size
        for start in range(0, frames, _MIX_BLOCK):  # in blocks: a float copy of all channels may be large
            block, mean = to_float(samples[start : start + _MIX_BLOCK]), mono[start : start + _MIX_BLOCK]
            np.add(
                block[:, 0], block[:, 1], out=mean
            )  # numpy's mean over a short axis takes 30 times as long
            for channel in range(2, channels):
                mean += block[:, channel]
            mean /= channels
            mixed_energy += float(np.dot(mean, mean))
            total += float(np.dot(block.ravel(), block.ravel()))
    if not mixed_energy < _CANCEL * total / channels or not np.isfinite(total):
        return mono, None
    loudest = int(
        np.argmax([np.abs(samples[:, channel].astype(np.float32)).sum() for channel in range(channels)])
    )
    detail = f"its {channels} channels cancel out (inverted phase): channel {loudest + 1} is taken alone"
    return to_float(samples[:, loudest]), Finding("antiphase", detail)


_SILENT = 0.001  # of full scale, -60 dB
_CLIPPED_SHARE = 0.001


def _levels(samples: np.ndarray, wave: np.ndarray) -> list[Finding]:
    """Silence of the mono `wave` [frames], and clipping of its source `samples` [frames, channels]."""
    full = 32767 if samples.dtype == np.int16 else 32767 / 32768
    peak = _peak(samples)
    findings = []
    if peak >= full:
        at_full = (samples >= full) | (samples <= -full)
        share = float(
            (at_full[1:] & at_full[:-1]).sum() / samples.size
        )  # in a row: a peak that is not clipped has one
        if share >= _CLIPPED_SHARE:
            over = f", its samples reach {peak:.4g} where 1 is full scale" if peak > 1.5 * full else ""
            findings.append(
                Finding(
                    "clipped",
                    f"{100 * share:.1f} % of its samples are at full scale, one after another{over}",
                )
            )
    if samples.shape[1] > 1:
        peak = _peak(wave)
    if peak < _SILENT * (32768 if wave.dtype == np.int16 else 1):
        findings.append(Finding("silent", "no sample is above -60 dB"))
    return findings


def is_silent(samples: np.ndarray) -> bool:
    """Whether no sample of float32 audio is above -60 dB."""
    return len(samples) == 0 or _peak(samples) < _SILENT


def _peak(samples: np.ndarray) -> float:
    return max(float(samples.max()), -float(samples.min()))


class Resampler:
    """Band-limited resampling of blocks [frames, channels] float32 that follow one another. Errors:
    AudioError odd_rate."""

    def __init__(self, rate: int, target: int, channels: int):
        import soxr

        self._stream, self._channels = None, channels
        if rate != target:
            try:
                self._stream = soxr.ResampleStream(rate, target, channels, dtype="float32", quality="HQ")
            except (ValueError, RuntimeError) as error:
                raise AudioError(
                    "odd_rate", f"{rate:,} Hz cannot be resampled to {target:,} Hz: {error}"
                ) from None

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        """Return what follows of the result. last: no more block follows; an empty one may be the last."""
        if self._stream is None:
            return samples
        return self._stream.resample_chunk(samples, last=last).reshape(-1, self._channels)


def mixed_block(samples: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    """Mix a block [frames, channels] to one channel [frames, 1], as `to_mono` does."""
    wave, antiphase = _mixed(samples)
    return wave[:, None], [antiphase] if antiphase else []


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Band-limited resampling of float32 [frames] or [frames, channels]. Errors: AudioError odd_rate |
    too_large."""
    if rate == target:
        return samples
    import soxr  # here: packing what is at 16 kHz starts without it

    frames = len(samples) * target / rate
    if frames * samples[:1].size * 4 > MAX_DECODED_BYTES:
        raise AudioError(
            "too_large",
            f"{len(samples) / rate:.3f} s from {rate:,} Hz are {frames:,.0f} frames at {target:,} Hz",
        )
    try:
        return soxr.resample(samples, rate, target, quality="HQ")
    except (ValueError, RuntimeError) as error:
        raise AudioError("odd_rate", f"{rate:,} Hz cannot be resampled to {target:,} Hz: {error}") from None
