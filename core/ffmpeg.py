"""Decode by FFmpeg's libraries (PyAV, optional) what libsndfile does not know: AAC, MP4, WebM, WMA, AMR and
more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from core.audio_limits import AudioError, Limits, Piece

INSTALL = "make setup EXTRAS=av"
# Formats that may be opened. Playlists (HLS, DASH, concat) are not among them: they name other files and
# addresses.
_FORMATS = (
    "mov,matroska,asf,xwma,amr,amrnb,amrwb,aac,loas,ac3,eac3,dts,truehd,mlp,flv,avi,mpeg,mpegts,ogg,wav,w64,aiff,caf,flac,mp3,"
    "au,nistsphere,voc,wv,tta,ape,mpc,mpc8,tak,dsf,oma,rm"
)
# Formats whose header tells the duration; of the others FFmpeg guesses it from the bit rate or from the
# file's size.
_TELL_DURATION = {"mov", "matroska", "flv", "wv", "tta", "ape", "caf", "mpc", "mpc8", "tak"}
_SLACK_SECONDS = 0.25  # durations are rounded, and count the encoder's padding or do not
_SIGNS = {  # (offset, bytes) of files that need PyAV -> what they are
    (4, b"ftyp"): "MP4 (M4A, AAC)",
    (0, b"\x1a\x45\xdf\xa3"): "WebM or Matroska",
    (0, b"\x30\x26\xb2\x75"): "WMA (ASF)",
    (0, b"#!AMR"): "AMR",
    (0, b"\xff\xf1"): "AAC (ADTS)",
    (0, b"\xff\xf9"): "AAC (ADTS)",
    (0, b"FLV"): "FLV",
    (8, b"AVI "): "AVI",
}


def name_of(head: bytes) -> str | None:
    """What a file is that needs PyAV, by its first bytes; None for others."""
    return next(
        (name for (offset, sign), name in _SIGNS.items() if head[offset : offset + len(sign)] == sign), None
    )


def decode_file(file: IO[bytes] | str, limits: Limits, refusal: str) -> Piece:
    """Decode the best audio stream of a file to its end. refusal: why libsndfile does not decode it.

    Errors: AudioError no_decoder where PyAV is missing, undecodable, those of `limits`.
    """
    with _opened(file, refusal) as container:
        return _decode(container, limits)


def decode_blocks(file: IO[bytes] | str, seconds: float, refusal: str) -> Iterator[Piece]:
    """Decode the best audio stream of a file in pieces of about `seconds`, in order; the last one may be cut
    (`is_cut`). Errors: as of `decode_file`."""
    with _opened(file, refusal) as container:
        reading = _Reading(container)
        waiting: list[np.ndarray] = []
        size = 0
        for block in reading.blocks():
            waiting.append(block)
            size += len(block)
            # The last block may have to be shortened: it waits for the next one.
            if size - len(block) >= seconds * reading.rate:
                yield reading.piece(waiting[:-1])
                waiting, size = [block], len(block)
        waiting[-1] = reading.without_padding(waiting[-1])
        yield reading.piece(waiting)._replace(is_cut=reading.cut())


@contextmanager
def _opened(file: IO[bytes] | str, refusal: str) -> Iterator:
    """FFmpeg's container of a file. Errors: AudioError."""
    # A path is opened here: FFmpeg takes some names for addresses.
    with open(file, "rb") if isinstance(file, str) else file as opened:
        opened.seek(0)
        name = name_of(opened.read(16))
        opened.seek(0)
        try:
            import av
        except ImportError:
            if name is None:
                raise AudioError("undecodable", refusal) from None
            raise AudioError("no_decoder", f"{name} needs PyAV: {INSTALL}") from None
        try:
            container = av.open(
                opened, container_options={"format_whitelist": _FORMATS, "protocol_whitelist": ""}
            )
        except av.error.FFmpegError as error:
            words = refusal if name is None else f"{name}, but FFmpeg says: {error.strerror}"
            raise AudioError("undecodable", words) from None
        with container:
            yield container


class _Reading:
    """The best audio stream of a container, decoded once from its beginning."""

    def __init__(self, container):
        self._container, self.stream = container, container.streams.best("audio")
        self.name = container.format.name.partition(",")[0]
        if self.stream is None:
            raise AudioError("undecodable", f"a file of format {self.name} without audio")
        self.codec = self.stream.codec_context.name
        self.rate = self.frames = 0
        self._frame, self._channels = None, 0
        self._errors: list[int] = []  # frames that were decoded before each

    def blocks(self) -> Iterator[np.ndarray]:
        """Blocks of samples [frames, channels], to the stream's end. Errors: AudioError, at the end for
        damage in the middle."""
        import av

        packets = self._container.demux(self.stream)
        while True:
            try:
                decoded = next(packets).decode()
            except StopIteration:
                break
            except av.error.FFmpegError:
                self._errors.append(self.frames)
                continue
            for frame in decoded:
                block = _samples(frame)
                if self.frames and (frame.sample_rate, block.shape[1]) != (self.rate, self._channels):
                    raise AudioError(
                        "undecodable",
                        f"its rate or its channels change at {self.frames / self.rate:.3f} s: split it there",
                    )
                self.rate, self._channels, self._frame = frame.sample_rate, block.shape[1], frame
                self.frames += len(block)
                yield block
        if self._frame is None:
            raise AudioError(
                "undecodable" if self._errors else "zero_length",
                f"{self.codec} in {self.name}: no samples can be decoded",
            )
        if self._errors and self._errors[0] < self.frames - _SLACK_SECONDS * self.rate:
            raise AudioError(
                "undecodable",
                f"{self.codec} in {self.name} is damaged at {self._errors[0] / self.rate:.3f} s",
            )

    def without_padding(self, block: np.ndarray) -> np.ndarray:
        """The last block of all without the encoder's padding (ffmpeg 9 leaves it out too, but in fragmented
        files)."""
        frame = self._frame
        is_padded = self.name == "mov" and self.codec == "aac" and self.stream.frames
        if is_padded and frame is not None and frame.duration:
            return block[: round(frame.duration * frame.time_base * self.rate)]
        return block

    def cut(self) -> str:
        return "its last packet is incomplete" if self._errors else ""

    def piece(self, blocks: list[np.ndarray]) -> Piece:
        return Piece(np.concatenate(blocks), self.rate, self.name, self.codec)


def _decode(container, limits: Limits) -> Piece:
    reading = _Reading(container)
    blocks: list[np.ndarray] = []
    for block in reading.blocks():
        limits.add(len(block), reading.rate, block.shape[1], block.itemsize)
        blocks.append(block)
    blocks[-1] = reading.without_padding(blocks[-1])
    promised = _promised_seconds(container, reading.stream) if reading.name in _TELL_DURATION else None
    return reading.piece(blocks)._replace(
        promised=None if promised is None else round(promised * reading.rate),
        slack=_SLACK_SECONDS,
        is_cut=reading.cut(),
    )


def _promised_seconds(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # A container's duration is that of its longest stream.
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def _samples(frame) -> np.ndarray:
    """A decoded frame's samples [frames, channels]: int16 where they have 16 bits or fewer, else float32."""
    array, kind = frame.to_ndarray(), frame.format.name
    samples = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    if kind.startswith("u8"):
        return (samples.astype(np.int16) - 128) << 8
    if kind.startswith("s32"):
        return samples.astype(np.float32) / np.float32(2**31)
    return np.ascontiguousarray(samples, np.int16 if kind.startswith("s16") else np.float32)
