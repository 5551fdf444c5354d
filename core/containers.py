"""Find the audio inside a file's bytes: where each stream is, and how much its header declares. Nothing is
decoded here.

Decoders believe headers; recorders, taggers, `cat` and broken downloads make headers wrong. What is corrected
or noticed:

    WAV      the data chunk counts, not the RIFF size; sizes 0 and 0xFFFFFFFF mean "to the end"; odd chunks
             without padding
    MP3      frames are counted where no header tells their number (VBR without a Xing header), or where it
             cannot be right
    Ogg      chained streams; a last page that is incomplete, or has no end-of-stream mark
    others   AIFF, AU, CAF, W64, RF64, 8SVX, SPHERE: bytes that the header declares and the file does not hold
    all      ID3v2 tags in front; files joined one after another (WAV, FLAC, Ogg, MP3)
"""

from __future__ import annotations

import io
import os
import stat
import struct
from typing import IO, Literal, NamedTuple

from core import mpeg
from core.promises import UNKNOWN_SIZE, Source, is_chunk, next_chunk, promised_end

#: Bytes that a header may promise beyond the end of the file: writers that count the header itself in.
SLACK_BYTES = 44
#: Unexplained bytes after the data chunk are reported from this many seconds of audio on.
TRAILING_SECONDS = 0.25
MAX_STREAMS = 10_000

Kind = Literal["wav", "flac", "ogg", "mp3", "other"]
Order = Literal["<", ">"]
FindingKind = Literal[
    "cut",  # fewer samples than the header declares, or an end inside a page or frame
    "no_end",  # an Ogg stream without its end-of-stream mark
    "damaged",  # bytes between MP3 frames that belong to none
    "trailing",  # audio after what the header counts
    "joined",  # several files or streams one after another; all are decoded
    "antiphase",  # channels cancel out: the loudest one is taken instead of their mean
    "silent",  # no sample above -60 dB
    "clipped",  # at least one sample in 1,000 at full scale, beside another one
]


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes):
        self.data, self.size = data, len(data)

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]

    def file(self) -> IO[bytes]:
        return _Memory(self.data)


class FileSource:
    """A regular file. Errors: OSError; NotAFile for a FIFO, device, socket or folder."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._descriptor = open_regular(self.path)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, offset)

    def file(self) -> str:
        return self.path

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class NotAFile(OSError):
    """Something other than a regular file: opening or reading it may block for ever, or never end."""


_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike) -> int:
    """Open for reading without waiting for a FIFO's writer; return the descriptor. Errors: OSError,
    NotAFile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFile(f"is {_SPECIAL.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")
    return descriptor


class Stream(NamedTuple):
    """One stream of audio: bytes [begin, end) of the source, with `prefix` in front where the decoder needs
    another header.

    frames: samples per channel where they were counted; only decoding tells otherwise. The bytes of a 16-bit
    PCM WAV are its samples: it has `rate`, `channels` and `frames`.
    """

    kind: Kind
    begin: int
    end: int
    prefix: bytes = b""
    frames: int | None = None
    rate: int = 0
    channels: int = 0
    order: Order = "<"

    @property
    def is_pcm16(self) -> bool:
        return self.rate > 0

    def open(self, source: Source) -> IO[bytes] | str:
        """The stream as a file of its own, or the path of a file that is nothing else."""
        if self.begin == 0 and self.end == source.size and not self.prefix:
            return source.file()
        if isinstance(source, BytesSource):
            return _Memory(self.prefix + source.data[self.begin : self.end])
        return io.BufferedReader(_Window(source, self), 1 << 16)


class _Memory(io.BytesIO):
    """Bytes as a file. libsndfile seeks before the beginning of damaged files; an exception could not pass
    through it."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            offset = max(offset, 0)
        return super().seek(offset, whence)  # from elsewhere, a place before the beginning is the beginning


class _Window(io.RawIOBase):
    """A stream of a source, with its prefix, as a file. Read only."""

    def __init__(self, source: Source, stream: Stream):
        self._source, self._stream, self._place = source, stream, 0
        self._size = len(stream.prefix) + stream.end - stream.begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        )
        return self._place

    def readinto(self, buffer) -> int:
        prefix = self._stream.prefix
        count = max(0, min(len(buffer), self._size - self._place))
        if self._place < len(prefix):
            data = prefix[self._place : self._place + count]
        else:
            data = self._source.read(self._stream.begin + self._place - len(prefix), count)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class Layout(NamedTuple):
    """The streams of a source in order, and what was noticed: [(kind of finding, text)]."""

    streams: list[Stream]
    noticed: list[tuple[FindingKind, str]]


def locate(source: Source) -> Layout:
    """Return the streams of a source.

    Of a FileSource only headers are read: streams after the first are not looked for, and MP3 frames are not
    counted.
    """
    layout = Layout([], [])
    begin = _after_id3(source)
    head = source.read(begin, 16)
    if head[:4] in _RIFF and head[8:12] == b"WAVE":
        _wav(source, begin, layout)
    elif head[:4] == b"fLaC":
        _flac(source, begin, layout)
    elif head[:4] == b"OggS":
        _ogg(source, begin, layout)
    elif mpeg.frame_at(head):
        _mp3(source, begin, layout)
    elif not any(head) and mpeg.frame_at(source.read(after := _after_zeros(source, begin), 4)):
        _mp3(source, after, layout)
    else:
        _other(source, begin, layout)
    return layout


def _cut(promised: int, available: int) -> tuple[FindingKind, str]:
    return "cut", f"its header declares {promised:,} bytes, the file holds {max(available, 0):,}"


def _after_id3(source: Source) -> int:
    """The offset after ID3v2 tags, which taggers put in front of any format."""
    offset = 0
    while size := mpeg.id3_size(source.read(offset, 10)):
        offset += size
    return min(offset, source.size)


def _after_zeros(source: Source, begin: int) -> int:
    """The offset after zeros, which some cutters of MP3 leave in front."""
    data = source.read(begin, 1 << 16)
    return begin + len(data) - len(data.lstrip(b"\0"))


# --- WAV ----------------------------------------------------------------------------------------------------

_RIFF = (b"RIFF", b"RIFX", b"RF64", b"BW64")
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # that taggers append


def _wav(source: Source, begin: int, layout: Layout) -> None:
    """Streams of a WAV file, and of others that follow it."""
    while len(layout.streams) < MAX_STREAMS:
        order: Order = ">" if source.read(begin, 4) == b"RIFX" else "<"
        form = fact = b""
        long_size = 0
        parts: list[tuple[int, int]] = []  # offset and size of data chunks
        offset = begin + 12
        while is_chunk(head := source.read(offset, 8)) and head[:4] not in _RIFF:
            name, size = head[:4], struct.unpack(order + "I", head[4:])[0]
            offset += 8
            if name == b"fmt " and not form:
                form = source.read(offset, min(size, 1 << 16))
            elif name == b"fact":
                fact = source.read(offset, min(size, 1 << 10))
            elif name == b"ds64":
                long_size = int.from_bytes(source.read(offset + 8, 8), "little")
            elif name == b"data":
                size = _data_size(source, offset, long_size if size == 0xFFFFFFFF and long_size else size)
                parts.append((offset, size))
            offset = next_chunk(source, offset, size)
        if not parts or len(form) < 16:
            layout.streams.append(
                Stream("wav", begin, source.size)
            )  # the decoder has the words for what is missing
            return
        for part_begin, size in parts:
            _wav_part(source, order, form, fact, part_begin, size, layout)
        rest = source.read(offset, 12)
        if rest[:4] not in _RIFF or rest[8:] != b"WAVE":
            break
        begin = offset
    bytes_a_second = struct.unpack(order + "I", form[8:12])[0] or 1
    unexplained = source.size - offset
    follows = source.read(offset, 4096)
    if unexplained / bytes_a_second >= TRAILING_SECONDS and any(follows) and not follows.startswith(_TAGS):
        what = f"{unexplained:,} bytes after its data chunk belong to no chunk: the chunk's size may be out of date"  # noqa: E501
        layout.noticed.append(("trailing", what))


def _data_size(source: Source, offset: int, size: int) -> int:
    """The size of a data chunk; one that its writer could not know means all that follows."""
    rest = source.size - offset
    if size == 0 and not _holds_only_chunks(source, offset):
        return rest
    return rest if size >= UNKNOWN_SIZE and size > rest else size


def _holds_only_chunks(source: Source, offset: int) -> bool:
    """Whether whole chunks follow up to the end: an empty data chunk is then really empty."""
    while is_chunk(head := source.read(offset, 8)):
        offset = next_chunk(source, offset + 8, int.from_bytes(head[4:], "little"))
    return offset in (source.size, source.size + 1)


def _wav_part(
    source: Source, order: Order, form: bytes, fact: bytes, begin: int, size: int, layout: Layout
) -> None:
    """The stream of one data chunk: 16-bit PCM as it is, anything else under a header that is right."""
    available = max(min(size, source.size - begin), 0)
    if size > available + SLACK_BYTES:
        layout.noticed.append(_cut(size, available))
    tag, channels, rate, _, _, bits = struct.unpack(order + "HHIIHH", form[:16])
    if tag == 0xFFFE and len(form) >= 26:  # WAVEX: the tag is in its GUID
        tag = struct.unpack(order + "H", form[24:26])[0]
    if tag == 1 and bits == 16 and channels and rate:
        frames = available // (2 * channels)
        layout.streams.append(
            Stream("wav", begin, begin + frames * 2 * channels, b"", frames, rate, channels, order)
        )
        return

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack(order + "I", len(body)) + body + bytes(len(body) % 2)

    header = b"WAVE" + chunk(b"fmt ", form) + (chunk(b"fact", fact) if fact else b"") + b"data"
    data_size = min(available, 0xFFFFFFFF - len(header) - 4)
    riff = (b"RIFX" if order == ">" else b"RIFF") + struct.pack(order + "I", len(header) + 4 + data_size)
    layout.streams.append(
        Stream("wav", begin, begin + available, riff + header + struct.pack(order + "I", data_size))
    )


# --- FLAC ---------------------------------------------------------------------------------------------------


class StreamInfo(NamedTuple):
    """STREAMINFO of a FLAC file. frames: 0 where the encoder wrote to a pipe and could not know."""

    rate: int
    channels: int
    bits: int
    frames: int


def stream_info(head: bytes) -> StreamInfo | None:
    """STREAMINFO from a FLAC stream's first 26 bytes; None where it is not there."""
    if len(head) < 26 or head[4] & 0x7F or head[5:8] != b"\0\0\x22":
        return None
    packed = int.from_bytes(head[18:26], "big")
    return StreamInfo(packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1, packed & ((1 << 36) - 1))


def _flac(source: Source, begin: int, layout: Layout) -> None:
    starts = [begin]
    if isinstance(source, BytesSource):
        place = source.size
        while (place := source.data.rfind(b"fLaC", begin + 4, place)) >= 0 and len(
            starts
        ) < MAX_STREAMS:  # find is slower
            if stream_info(source.data[place : place + 26]):
                starts.insert(1, place)
    layout.streams.extend(
        Stream("flac", start, end) for start, end in zip(starts, [*starts[1:], source.size], strict=True)
    )


# --- Ogg ----------------------------------------------------------------------------------------------------

_LARGEST_PAGE = 27 + 255 + 255 * 255
_FIRST_PAGE, _LAST_PAGE = 2, 4  # bits of a page's flags


def _page(source: Source, offset: int) -> tuple[int, int] | None:
    """(flags, end offset) of the Ogg page at `offset`; None for anything else."""
    head = source.read(offset, 27 + 255)
    if len(head) < 27 or head[:4] != b"OggS" or len(head) < 27 + head[26]:
        return None
    return head[5], offset + 27 + head[26] + sum(head[27 : 27 + head[26]])


def _ogg(source: Source, begin: int, layout: Layout) -> None:
    tail_begin = max(begin, source.size - _LARGEST_PAGE)
    place = source.read(tail_begin, source.size - tail_begin).rfind(b"OggS")
    flags, end = _page(source, tail_begin + place) or (0, source.size + 1)
    rest = source.read(end, 4)
    if end > source.size or rest and b"OggS".startswith(rest):
        layout.noticed.append(("cut", "the file ends inside an Ogg page"))
    elif not flags & _LAST_PAGE:
        layout.noticed.append(
            ("no_end", "its last Ogg page has no end-of-stream mark: the recording may have been interrupted")
        )
    starts = _ogg_starts(source, begin) if isinstance(source, BytesSource) else [begin]
    layout.streams.extend(
        Stream("ogg", start, end) for start, end in zip(starts, [*starts[1:], source.size], strict=True)
    )


def _ogg_starts(source: BytesSource, begin: int) -> list[int]:
    """Where chained streams begin: at a first page that follows other pages (first pages in a row are
    multiplexed)."""
    starts = [begin]
    if source.data.count(b"OggS\0\x02") < 2:
        return starts
    offset, in_header = begin, True
    while 0 <= offset < source.size and len(starts) < MAX_STREAMS:
        page = _page(source, offset)
        if page is None:  # damage: the next page
            offset = source.data.find(b"OggS", offset + 1)
            continue
        is_first = bool(page[0] & _FIRST_PAGE)
        if is_first and not in_header:
            starts.append(offset)
        in_header, offset = is_first, page[1]
    return starts


# --- MP3 ----------------------------------------------------------------------------------------------------


def _mp3(source: Source, begin: int, layout: Layout) -> None:
    if not isinstance(source, BytesSource):
        layout.streams.append(Stream("mp3", 0, source.size))  # libsndfile reads ID3 tags itself
        return
    data = source.data[begin:]
    data = data[: mpeg.end_before_tags(data)]
    count = mpeg.count_frames(data)
    if not count.runs:
        layout.streams.append(Stream("mp3", begin, source.size))
        return
    if count.ends_inside:
        layout.noticed.append(("cut", "the file ends inside an MPEG frame"))
    if count.skipped:
        layout.noticed.append(("damaged", f"{count.skipped:,} bytes between its MPEG frames belong to none"))
    last = count.runs[-1]
    if not count.ends_inside and last.frames < (last.promised or 0) - mpeg.COUNT_SLACK:
        layout.noticed.append(
            ("cut", f"its header declares {last.promised:,} MPEG frames, the file holds {last.frames:,}")
        )
    for run, end in zip(count.runs, [*(run.begin for run in count.runs[1:]), len(data)], strict=True):
        if run.is_promise_right:
            layout.streams.append(Stream("mp3", begin + run.begin, begin + end))
        else:  # a decoder would stop at the header's count, so the header is left out
            start = run.begin + (run.first.size if run.promised is not None else 0)
            layout.streams.append(Stream("mp3", begin + start, begin + end, frames=run.samples))


# --- other containers: what the header declares -------------------------------------------------------------


def _other(source: Source, begin: int, layout: Layout) -> None:
    """A stream whose header may promise an end: the file may be cut before it, or another file may follow
    it."""
    magic = source.read(begin, 4)
    while (end := promised_end(source, begin)) is not None and begin < end <= source.size:
        following = next((place for place in (end, end + 1) if source.read(place, 4) == magic), None)
        if following is None or len(layout.streams) >= MAX_STREAMS:
            break
        layout.streams.append(Stream("other", begin, end))
        begin = following
    layout.streams.append(Stream("other", begin, source.size))
    if end is not None and end > source.size + SLACK_BYTES:
        layout.noticed.append(_cut(end - begin, source.size - begin))
