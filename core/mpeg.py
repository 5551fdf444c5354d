"""Count the frames of MPEG audio (MP3), whose length no header has to tell, and find where joined files
begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# kbit/s by (is MPEG-1, layer)
_KBPS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_RATE_SHIFT = {3: 0, 2: 1, 0: 2}  # by version bits: MPEG-1, MPEG-2, MPEG-2.5
_TAGS = (b"Xing", b"Info")
#: A Xing header's count may be off by this: some writers count the header's own frame, some omit the last
# one.
COUNT_SLACK = 2


class Frame(NamedTuple):
    """Header of an MPEG audio frame."""

    size: int  # bytes
    samples: int  # per channel
    kind: tuple[int, int, int]  # rate, channels, layer
    tag: int  # offset of a Xing header in it


def frame_at(data: bytes, offset: int = 0) -> Frame | None:
    """The frame whose header is at `offset`; None for anything else, and for free format, which does not tell
    its size."""
    head = data[offset : offset + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, bitrate, rate_index = (
        head[1] >> 3 & 3,
        4 - (head[1] >> 1 & 3),
        head[2] >> 4,
        head[2] >> 2 & 3,
    )
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate_index == 3:
        return None
    is_mpeg1, channels, padding = version == 3, 1 if head[3] >> 6 == 3 else 2, head[2] >> 1 & 1
    rate = _RATES[rate_index] >> _RATE_SHIFT[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and not is_mpeg1 else 1152
    unit = 4 if layer == 1 else 1  # bytes a slot
    size = (samples // 8 // unit * _KBPS[is_mpeg1, layer][bitrate - 1] * 1000 // rate + padding) * unit
    side = (17 if channels == 1 else 32) if is_mpeg1 else (9 if channels == 1 else 17)
    return Frame(size, samples, (rate, channels, layer), 4 + side)


def _has_tag(data: bytes, offset: int, frame: Frame) -> bool:
    place = offset + frame.tag
    return data[place : place + 4] in _TAGS or data[offset + 36 : offset + 40] == b"VBRI"


def _tagged_frames(data: bytes, offset: int, frame: Frame) -> int:
    """The number of frames by the Xing, Info or VBRI header in the frame at `offset`; 0 where it does not
    tell it."""
    place = offset + frame.tag
    if data[place : place + 4] in _TAGS:
        flags = int.from_bytes(data[place + 4 : place + 8], "big")
        return int.from_bytes(data[place + 8 : place + 12], "big") if flags & 1 else 0
    return int.from_bytes(data[offset + 50 : offset + 54], "big")


@dataclass
class Run:
    """Frames that belong together, from byte `begin` on: one file, of which several may be joined."""

    begin: int
    first: Frame
    promised: int | None  # frames by its header, None without one
    frames: int = 0  # of audio

    @property
    def is_promise_right(self) -> bool:
        return bool(self.promised) and abs((self.promised or 0) - self.frames) <= COUNT_SLACK

    @property
    def samples(self) -> int:
        return self.frames * self.first.samples


class Count(NamedTuple):
    """What an MP3 file holds. ends_inside: its last frame is incomplete; skipped: bytes that are in no frame
    or tag."""

    runs: list[Run]
    ends_inside: bool
    skipped: int


def count_frames(data: bytes) -> Count:
    """Walk over all frames of an MP3 file."""
    frames: dict[
        bytes, Frame | None
    ] = {}  # by header: few different ones occur, and this loop runs 38 times a second of audio
    runs: list[Run] = []
    offset, end, skipped = 0, len(data), 0
    run: Run | None = None
    while offset + 4 <= end:
        head = data[offset : offset + 4]
        if head not in frames:
            frames[head] = frame_at(head)
        frame = frames[head]
        if frame is None or run is not None and frame.kind != run.first.kind:
            if size := _other_tag(data, offset):
                offset += size
                continue
            place = _next_frames(data, offset)
            if place != offset or frame is None:
                skipped += place - offset
                offset = place
                continue
            run = None  # another rate or number of channels: another file
        if offset + frame.size > end:
            return Count([run for run in runs if run.frames], True, skipped)
        # Two bytes first: few frames have one of these.
        may_have_tag = offset + 40 <= end and (
            data[offset + frame.tag] in b"XI" or data[offset + 36] == 86
        )  # 86: V
        has_tag = may_have_tag and _has_tag(data, offset, frame)
        if (
            run is None
            or has_tag
            or run.promised == run.frames
            and _are_frames(data, offset, COUNT_SLACK + 1)
        ):
            # Frames beyond a header's count are those of a file without a header that was joined.
            run = Run(offset, frame, _tagged_frames(data, offset, frame) if has_tag else None)
            runs.append(run)
        if not has_tag:
            run.frames += 1
        offset += frame.size
    return Count([run for run in runs if run.frames], False, skipped)


def _are_frames(data: bytes, offset: int, count: int) -> bool:
    """Whether `count` frames of one kind follow each other at `offset` (fewer where the data ends with
    one)."""
    first = None
    for _ in range(count):
        frame = frame_at(data, offset)
        if frame is None or first is not None and frame.kind != first.kind:
            return False
        first = first or frame
        offset += frame.size
        if offset >= len(data):
            return offset == len(data)
    return True


def _next_frames(data: bytes, offset: int) -> int:
    """The offset, from `offset` on, at which three frames follow each other; the end where there is none."""
    while (offset := data.find(b"\xff", offset)) >= 0:
        if _are_frames(data, offset, 3):
            return offset
        offset += 1
    return len(data)


def _other_tag(data: bytes, offset: int) -> int:
    """Bytes of an ID3 or APE tag, or of zeros, at `offset`; 0 for none."""
    if data[offset : offset + 3] == b"ID3":
        return id3_size(data[offset : offset + 10])
    if data[offset : offset + 3] == b"TAG":
        return 128
    if data[offset : offset + 8] == b"APETAGEX":
        return 32 + int.from_bytes(data[offset + 12 : offset + 16], "little")
    rest = data[offset : offset + 4096]
    return len(rest) - len(rest.lstrip(b"\0"))


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag whose first 10 bytes are given; 0 for none."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + size + (10 if head[5] & 0x10 else 0)


def end_before_tags(data: bytes) -> int:
    """The end of the audio in an MP3 file: where its ID3v1 and APE tags begin."""
    end = len(data)
    if data[-128:-125] == b"TAG":
        end -= 128
    foot = data[max(end - 32, 0) : end]
    if foot[:8] == b"APETAGEX" and len(foot) == 32:
        end -= int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 0x80 else 0)
    return max(end, 0)
