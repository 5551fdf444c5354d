"""Decode by FFmpeg's libraries (PyAV, optional) what libsndfile does not know: AAC, MP4, WebM, WMA, AMR and
more."""

from __future__ import annotations

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
            return _decode(container, limits)


def _decode(container, limits: Limits) -> Piece:
    import av

    stream = container.streams.best("audio")
    name = container.format.name.partition(",")[0]
    if stream is None:
        raise AudioError("undecodable", f"a file of format {name} without audio")
    blocks: list[np.ndarray] = []
    rate = frames = 0
    frame, errors = None, []  # errors: frames that were decoded before each
    packets = container.demux(stream)
    while True:
        try:
            decoded = next(packets).decode()
        except StopIteration:
            break
        except av.error.FFmpegError:
            errors.append(frames)
            continue
        for frame in decoded:
            block = _samples(frame)
            if blocks and (frame.sample_rate, block.shape[1]) != (rate, blocks[0].shape[1]):
                raise AudioError(
                    "undecodable", f"its rate or its channels change at {frames / rate:.3f} s: split it there"
                )
            rate = frame.sample_rate
            limits.add(len(block), rate, block.shape[1], block.itemsize)
            blocks.append(block)
            frames += len(block)
    codec = stream.codec_context.name
    if frame is None:
        raise AudioError(
            "undecodable" if errors else "zero_length", f"{codec} in {name}: no samples can be decoded"
        )
    if name == "mov" and codec == "aac" and frame.duration and stream.frames:
        # The rest of the last frame is the encoder's padding (ffmpeg 9 leaves it out too, but in fragmented
        # files).
        blocks[-1] = blocks[-1][: round(frame.duration * frame.time_base * rate)]
    if errors and errors[0] < frames - _SLACK_SECONDS * rate:
        raise AudioError("undecodable", f"{codec} in {name} is damaged at {errors[0] / rate:.3f} s")
    promised = _promised_seconds(container, stream) if name in _TELL_DURATION else None
    return Piece(
        np.concatenate(blocks),
        rate,
        name,
        codec,
        None if promised is None else round(promised * rate),
        _SLACK_SECONDS,
        "its last packet is incomplete" if errors else "",
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
