"""Spoken dialogue and its text out of the adventure game "Flight of the Amazon Queen". Changes when the
game's files do.

The Debian package holds one resource file, `queen.1c`, in the layout that ScummVM made for it:

    bytes 0-3 "QTBL" | bytes 13-14 entry count, big-endian u16 | from byte 15 one entry of 21 bytes each:
    12 bytes name, NUL padded | 1 byte bundle | u32 offset | u32 size (big-endian)

Speech entries (`*.SB`) are MP3 at 11,025 Hz. Two kinds have a text:

- dialogue: `KKLLLLWS.SB` = talk key KK, line LLLL (hex), speaker W (J: the hero Joe, P: the other one),
  segment S (hex, from 1). The lines are in `*.DOG` entries (20 bytes header, then a talk header and two
  string tables, Joe's and the other's).
- descriptions, spoken by Joe: `JOEnnnnS.SB` = segment S of line nnnn - 41 of the text file `QUEEN2.JAS`.

A line is cut into segments by `*` followed by a stage direction (two characters, or XY and a position).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import soundfile
from tqdm import tqdm

STAGE_DIRECTION = re.compile(r"XY[\d, -]{7}|[A-Z0-9 ]{2}")
DESCRIPTION = re.compile(r"JOE(\d{4})(\d)\.SB")
DESCRIPTION_SHIFT = 41  # first spoken line of QUEEN2.JAS has the number 41
TALK_HEADER, CHOICES_SIZE = 32, 96  # bytes before the conversation tree, bytes of one level of it


class Resources:
    """The entries of `queen.1c` by name. Errors: ValueError when the file is not that resource file."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:4] != b"QTBL":
            raise ValueError(
                f"{path} is not the game's resource file (it should begin with QTBL): fetch the package again"
            )
        self.entries: dict[str, tuple[int, int]] = {}
        (count,) = struct.unpack_from(">H", self.data, 13)
        for i in range(count):
            name, _, offset, size = struct.unpack_from(">12sBII", self.data, 15 + 21 * i)
            self.entries[name.split(b"\0")[0].decode("latin-1")] = (offset, size)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> bytes:
        offset, size = self.entries[name]
        return self.data[offset : offset + size]


def segments(line: str) -> list[str]:
    """The spoken pieces of a line, stage directions removed."""
    first, *later = line.split("*")
    return [first.strip()] + [
        STAGE_DIRECTION.sub("", piece, count=1).strip() if STAGE_DIRECTION.match(piece) else piece.strip()
        for piece in later
    ]


def _strings(talk: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    """(line number, text) of a string table; texts are padded to four bytes. A table that runs past the end
    yields nothing."""
    lines = []
    for _ in range(count):
        if at + 5 > len(talk):
            return
        _, number, length = struct.unpack_from(">hhB", talk, at)
        at += 5
        if length:
            lines.append((number, talk[at : at + length].decode("latin-1")))
            at += length
            at += -at % 4
    yield from lines


def dialogue_lines(talk: bytes) -> Iterator[tuple[str, str]]:
    """(name of the speech entry, text) for each segment that the `.DOG` entry (without its first 20 bytes)
    speaks of."""
    levels, _, key, joe_lines, other_lines = struct.unpack_from(">5h", talk, 0)
    (others_at,) = struct.unpack_from(">H", talk, 22)
    tables = (("J", TALK_HEADER + abs(levels) * CHOICES_SIZE, joe_lines), ("P", others_at, other_lines))
    for who, at, count in tables:
        for number, line in _strings(talk, at, count):
            if number < 0 or not (line.isascii() and line.isprintable()):
                continue
            stem = f"{key:2d}{number:4X}{who}".replace(" ", "0")
            for i, text in enumerate(segments(line), 1):
                yield f"{stem}{i:X}.SB", text


def description_lines(resources: Resources) -> Iterator[tuple[str, str]]:
    lines = resources["QUEEN2.JAS"].decode("latin-1").replace("\r", "").split("\n")
    for name in resources.entries:
        match = DESCRIPTION.fullmatch(name)
        if match is None:
            continue
        number, segment = int(match[1]) - DESCRIPTION_SHIFT, int(match[2])
        if 0 <= number < len(lines) and 1 <= segment <= len(pieces := segments(lines[number])):
            yield name, pieces[segment - 1].strip(' "')


def read(path: Path, out: Path) -> list[dict]:
    """Write the clips as OUT/NAME.mp3; one manifest row each: id, audio, text, lang, duration (seconds),
    speaker, dialogue.

    `dialogue` is the talk key, or "JOE" for the descriptions. Entries without text or not decodable are left
    out.
    """
    resources = Resources(path)
    spoken: dict[str, str] = {}
    for name in resources.entries:
        if name.endswith(".DOG"):
            spoken.update(dialogue_lines(resources[name][20:]))
    spoken.update(description_lines(resources))
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, text in tqdm(sorted(spoken.items()), desc="dialogues", unit="clip"):
        if not text or name not in resources:
            continue
        clip = resources[name]
        try:
            info = soundfile.info(io.BytesIO(clip))
        except soundfile.LibsndfileError:
            continue
        stem = name.removesuffix(".SB")
        audio = out / f"{stem}.mp3"
        if not audio.exists() or audio.stat().st_size != len(clip):
            audio.write_bytes(clip)
        dialogue = "JOE" if stem.startswith("JOE") else stem[:2]
        hero = dialogue == "JOE" or stem[6] == "J"
        rows.append(
            {
                "id": stem,
                "audio": str(audio),
                "text": text,
                "lang": "en",
                "duration": round(info.duration, 3),
                "speaker": "joe" if hero else f"other-{dialogue}",
                "dialogue": dialogue,
            }
        )
    return rows
