"""Kaldi data folders: wav.scp, text, and where they are segments, utt2spk, utt2lang, utt2dur."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault, number


def keyed_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(key, rest) of each line. Errors: CorpusError for a file that is not sorted by key, as Kaldi itself demands."""
    last = ""
    with open(path, encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            key, *rest = re.split(r"[ \t]+", line.strip(), maxsplit=1)  # a transcript may hold tabs, or begin behind one
            if not key:
                continue
            if key.encode() <= last.encode() and last:
                raise CorpusError(f"{path}:{place}: '{key}' after '{last}': sort it with LC_ALL=C sort, or utils/fix_data_dir.sh")
            last = key
            yield key, rest[0] if rest else ""


class _Lookup:
    """Values of a sorted file for keys that come sorted: two files are joined line by line, neither is in memory."""

    def __init__(self, path: Path):
        self.lines, self.current = (keyed_lines(path), ("", "")) if path.exists() else (iter(()), ("", ""))

    def __getitem__(self, key: str) -> str | None:
        while self.current is not None and self.current[0].encode() < key.encode():
            self.current = next(self.lines, None)
        return self.current[1] if self.current is not None and self.current[0] == key else None


class Kaldi:
    """PATH is the data folder. Commands in wav.scp (`... |`) are refused unless --allow-pipes is given; then each runs once.

    Offsets into archives (`data.ark:1234`) are followed. Relative paths start from root (default: where the command runs).
    Segments of one channel (a fifth column) are reported: whole files are read, all channels averaged.
    """

    def __init__(self, path: Path, lang: str | None = None, root: str | None = None):
        self.folder, self.lang, self.root = path, lang, Path(root or ".").absolute()
        if not (path / "wav.scp").exists():
            raise CorpusError(f"{path} holds no wav.scp: not a Kaldi data folder")

    def audio(self, value: str) -> str:
        if value.endswith("|"):
            return "pipe:" + value[:-1].strip()
        if match := re.fullmatch(r"(.+\.ark):(\d+)", value):
            return f"ark:{self.root / match[1]}#{match[2]}"
        return str(self.root / value)

    def __iter__(self) -> Iterator[Entry | Fault]:
        text, speaker, lang = (_Lookup(self.folder / name) for name in ("text", "utt2spk", "utt2lang"))
        seconds = _Lookup(self.folder / "utt2dur")
        for clip in self._clips():
            if isinstance(clip, Fault):
                yield clip
                continue
            key, audio, recording, offset, duration = clip
            if offset is None and (told := seconds[key]) is not None:  # of a stretch, segments says more exactly what is meant
                duration = number(told)
                if duration is None:
                    raise CorpusError(f"{self.folder / 'utt2dur'}: '{key} {told}' is not UTTERANCE SECONDS")
            pipe = audio.startswith("pipe:")
            yield Entry(
                id=key,
                audio=audio,
                text=text[key],
                lang=lang[key] or self.lang,
                task="asr",
                speaker=speaker[key],
                offset=offset,
                duration=duration,
                recording=recording,
                group=recording if pipe else None,
            )

    def _clips(self) -> Iterator[tuple[str, str, str, float | None, float | None] | Fault]:
        segments = self.folder / "segments"
        if not segments.exists():
            for key, value in keyed_lines(self.folder / "wav.scp"):
                yield key, self.audio(value), key, None, None
            return
        recordings = {key: self.audio(value) for key, value in keyed_lines(self.folder / "wav.scp")}
        for key, value in keyed_lines(segments):
            try:
                recording, start, end, *channel = value.split()
                offset, duration = float(start), float(end) - float(start)
            except ValueError:
                raise CorpusError(f"{segments}: '{key} {value}' is not UTTERANCE RECORDING START END") from None
            if channel:  # the average of all channels would have the other speakers too
                detail = f"channel {channel[0]} of recording '{recording}': extract the channels to files first"
                yield Fault(key, "bad_row", detail)
            elif recording not in recordings:
                yield Fault(key, "bad_row", f"segments speaks of recording '{recording}', wav.scp does not")
            else:  # an end of -1 is the recording's end
                yield key, recordings[recording], recording, offset, None if float(end) < 0 else duration
