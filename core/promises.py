"""Find the end of the audio, or of the file, that an audio file's header declares. A file that ends before
it is cut."""

from __future__ import annotations

import struct
from typing import IO, Protocol

UNKNOWN_SIZE = 0x7FFFF000  # sizes from here on are what writers to a pipe put into 32 bits


class Source(Protocol):
    """Bytes that can be read at any offset."""

    size: int

    def read(self, offset: int, count: int) -> bytes: ...

    def file(self) -> IO[bytes] | str: ...


def is_chunk(head: bytes) -> bool:
    return len(head) == 8 and all(32 <= byte < 127 for byte in head[:4])


def next_chunk(source: Source, offset: int, size: int) -> int:
    """The offset after a chunk's body of `size` bytes at `offset`: chunks of odd size are padded, or should
    be."""
    end = offset + size
    if size % 2 and not (is_chunk(source.read(end, 8)) and not is_chunk(source.read(end + 1, 8))):
        return end + 1
    return end


def promised_end(source: Source, begin: int) -> int | None:
    """Return the offset of the end that the header declares, of the audio or the file; None without one."""
    head = source.read(begin, 40)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        return _iff_end(source, begin + 12)
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        offset, size = struct.unpack((">" if head[:4] == b".snd" else "<") + "II", head[4:12])
        return None if size == 0xFFFFFFFF else begin + offset + size
    if head[:4] == b"caff":
        return _caf_end(source, begin + 8)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        return _w64_end(source, begin + 40)
    if head[:7] == b"NIST_1A":
        return _sphere_end(source, begin)
    if head[4:8] == b"ftyp":
        return _mp4_end(source, begin)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_end(source, begin)
    if head[:16] == _ASF:
        return _asf_end(source, begin)
    if head[:4] == b"RIFF":  # AVI
        return begin + 8 + int.from_bytes(head[4:8], "little")
    return None


def _iff_end(source: Source, offset: int) -> int | None:
    while is_chunk(head := source.read(offset, 8)):
        size = int.from_bytes(head[4:], "big")
        if head[:4] in (b"SSND", b"BODY"):
            return offset + 8 + size if size < UNKNOWN_SIZE else None
        offset = next_chunk(source, offset + 8, size)
    return None


def _caf_end(source: Source, offset: int) -> int | None:
    while (
        len(head := source.read(offset, 12)) == 12
        and (size := int.from_bytes(head[4:], "big", signed=True)) >= 0
    ):
        if head[:4] == b"data":
            return offset + 12 + size
        offset += 12 + size
    return None


def _w64_end(source: Source, offset: int) -> int | None:
    while len(head := source.read(offset, 24)) == 24 and (size := int.from_bytes(head[16:], "little")) >= 24:
        if head[:4] == b"data":
            return offset + size
        offset += size + -size % 8
    return None


def _sphere_end(source: Source, begin: int) -> int | None:
    head = source.read(begin, 1 << 14).decode("latin-1")
    try:
        size = int(head[8:16])
        fields = {words[0]: words[2] for line in head[:size].splitlines() if len(words := line.split()) == 3}
        if "," in fields.get("sample_coding", ""):  # compressed: the number of bytes is not told
            return None
        samples = int(fields["sample_count"]) * int(fields["sample_n_bytes"]) * int(fields["channel_count"])
    except (ValueError, KeyError):
        return None
    return begin + size + samples


def _mp4_end(source: Source, offset: int) -> int | None:
    """The end of the last box at the top level."""
    while len(head := source.read(offset, 16)) >= 8:
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: up to the end of the file
            return None
        offset += size
    return offset


_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf_end(source: Source, begin: int) -> int | None:
    """The end of a WMA file by its file properties; live streams tell none."""
    head = source.read(begin, 1 << 16)
    place = head.find(_ASF_FILE_PROPERTIES)
    properties = head[place : place + 92]
    if place < 0 or len(properties) < 92 or properties[88] & 1:
        return None
    return begin + int.from_bytes(properties[40:48], "little") or None


def _matroska_end(source: Source, begin: int) -> int | None:
    """The end of the segment; recorders of live streams leave it open."""
    offset = begin + 4
    for _ in range(2):  # the size of the EBML header, then that of the segment after it
        head = source.read(offset, 8)
        width = 9 - head[0].bit_length() if head and head[0] else 0
        if not width or len(head) < width:
            return None
        size = int.from_bytes(head[:width], "big") - (1 << 7 * width)
        if size == (1 << 7 * width) - 1:
            return None
        end = offset + width + size
        if source.read(end, 4) != b"\x18\x53\x80\x67":
            return end
        offset = end + 4
    return end
