"""Kaldi data folders: wav.scp, text, and where they are segments, utt2spk, utt2lang, utt2dur."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.corpora import Entry, Ignored, Item, Reader, Rejection
from data_tools.corpora.columns import number
from data_tools.text_files import CorpusError, Problem, damage, existing, lines


def keyed_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[str, str | Problem]]:
    """(key, rest) of each line. Errors: CorpusError for a file that is not sorted by key, as Kaldi itself
    demands."""
    last = ""
    for place, line in lines(path, encoding):
        if isinstance(line, Problem):
            raise CorpusError(f"{path}:{place}: {line.detail}")
        try:
            # A transcript may hold tabs, or begin behind one.
            key, rest = (*re.split(r"[ \t]+", line.decode().strip(), maxsplit=1), "")[:2]
        except UnicodeDecodeError:
            key, rest = line.split(None, 1)[0].decode("ascii", "replace"), damage(line)
        if not key:
            continue
        if key.encode() <= last.encode() and last:
            raise CorpusError(
                f"{path}:{place}: '{key}' after '{last}': sort it with LC_ALL=C sort, or "
                f"utils/fix_data_dir.sh"
            )
        last = key
        yield key, rest


class _Lookup:
    """Values of a sorted file for keys that come sorted: two files are joined line by line, neither is in
    memory.

    passed: keys of the file that were not asked for, since the last look.
    """

    def __init__(self, path: Path, encoding: str | None):
        path = existing(path)
        self.name, self.exists = path.name, path.exists()
        self._lines = keyed_lines(path, encoding) if self.exists else iter(())
        self._current: tuple[str, str | Problem] | None = next(self._lines, None)
        self.passed: list[str] = []

    def get(self, key: str) -> str | Problem | None:
        while self._current is not None and self._current[0].encode() < key.encode():
            self.passed.append(self._current[0])
            self._current = next(self._lines, None)
        if self._current is None or self._current[0] != key:
            return None
        value = self._current[1]
        self._current = next(self._lines, None)
        return value

    def rest(self) -> Iterator[str]:
        """Keys after the last one that was asked for."""
        while self._current is not None:
            yield self._current[0]
            self._current = next(self._lines, None)


class _Clip(NamedTuple):
    key: str
    audio: str
    recording: str
    offset: float | None
    duration: float | None
    values: dict[str, str | Problem | None]


class Kaldi(Reader):
    """PATH is the data folder. Commands in wav.scp (`... |`) are refused unless --allow-pipes is given; then
    each runs once.

    Offsets into archives (`data.ark:1234`) are followed. Relative paths start from root (default: where the
    command runs). Segments of one channel (a fifth column) are reported: whole files are read, all channels
    averaged. Transcripts of utterances that wav.scp or segments does not have are reported.
    """

    def __init__(self, path: Path, lang: str | None = None, root: str | None = None):
        self.folder, self.lang, self.root = path, lang, Path(root or ".").absolute()
        if not existing(path / "wav.scp").exists():
            raise CorpusError(f"{path} holds no wav.scp: not a Kaldi data folder")

    def audio(self, value: str) -> str:
        if value.endswith("|"):
            return "pipe:" + value[:-1].strip()
        if match := re.fullmatch(r"(.+\.ark):(\d+)", value):
            return f"ark:{self.root / match[1]}#{match[2]}"
        return str(self.root / value)

    def records(self) -> Iterator[tuple[str, Any]]:
        files = {
            name: _Lookup(self.folder / name, self.encoding)
            for name in ("text", "utt2spk", "utt2lang", "utt2dur")
        }
        text, others = files["text"], [file for name, file in files.items() if name != "text"]
        passed, missing = dict.fromkeys(files, 0), dict.fromkeys(files, 0)
        for clip in self._clips():
            if isinstance(clip, Rejection | Ignored):
                yield "", clip
                if isinstance(clip, Ignored):
                    continue
            key = clip.id if isinstance(clip, Rejection) else clip.key
            values = {name: file.get(key) for name, file in files.items()}
            yield from ((name, _unmatched(name)) for name in text.passed)
            text.passed.clear()
            for file in others:
                passed[file.name.partition(".")[0]] += len(file.passed)
                file.passed.clear()
            if not isinstance(clip, Rejection):
                for name, file in files.items():
                    missing[name] += file.exists and values[name] is None
                yield key, clip._replace(values=values)
        yield from ((name, _unmatched(name)) for name in text.rest())
        for name in ("utt2spk", "utt2lang", "utt2dur"):
            if count := passed[name] + sum(1 for _ in files[name].rest()):
                yield "", Ignored(f"lines of {name} without an utterance", count)
            if missing[name]:
                yield (
                    "",
                    Ignored(
                        f"gaps in {name}: utterances without a line there, which are kept", missing[name]
                    ),
                )

    def sample(self, clip: _Clip, where: str) -> Item:
        values: dict[str, str | None] = {}
        for name, value in clip.values.items():
            if isinstance(value, Problem):
                return Rejection(clip.key, value.reason, f"{name}: {value.detail}")
            values[name] = value
        duration = clip.duration
        # Of a stretch, segments says more exactly what is meant.
        if clip.offset is None and (duration_text := values["utt2dur"]) is not None:
            duration = number(duration_text)
            if duration is None:
                return Rejection(
                    clip.key, "bad_row", f"utt2dur: '{clip.key} {duration_text}' is not UTTERANCE SECONDS"
                )
        return Entry(
            id=clip.key,
            audio=clip.audio,
            text=values["text"],
            lang=values["utt2lang"] or self.lang,
            task="asr",
            speaker=values["utt2spk"],
            offset=clip.offset,
            duration=duration,
            recording=clip.recording,
            group=clip.recording if clip.audio.startswith("pipe:") else None,
        )

    def _clips(self) -> Iterator[_Clip | Rejection | Ignored]:
        scp, segments = existing(self.folder / "wav.scp"), existing(self.folder / "segments")
        if not segments.exists():
            for key, value in keyed_lines(scp, self.encoding):
                if isinstance(value, Problem) or not value:
                    detail = value.detail if isinstance(value, Problem) else "no file behind the key"
                    yield Rejection(key, "bad_row", f"{scp.name}: {detail}")
                else:
                    yield _Clip(key, self.audio(value), key, None, None, {})
            return
        recordings = {key: value for key, value in keyed_lines(scp, self.encoding)}
        used: set[str] = set()
        for key, value in keyed_lines(segments, self.encoding):
            item = self._segment(key, value, recordings)
            if isinstance(item, _Clip):
                used.add(item.recording)
            yield item
        if unused := len(recordings.keys() - used):
            yield Ignored("recordings of wav.scp without a segment", unused)

    def _segment(
        self, key: str, value: str | Problem, recordings: dict[str, str | Problem]
    ) -> _Clip | Rejection:
        if isinstance(value, Problem):
            return Rejection(key, value.reason, f"segments: {value.detail}")
        try:
            recording, start, end, *channel = value.split()
            offset, duration = float(start), float(end) - float(start)
        except ValueError:
            return Rejection(
                key, "bad_row", f"segments: '{key} {value}' is not UTTERANCE RECORDING START END"
            )
        if channel:  # the average of all channels would have the other speakers too
            return Rejection(
                key,
                "bad_row",
                f"channel {channel[0]} of recording '{recording}': extract the channels to files first",
            )
        if recording not in recordings:
            return Rejection(key, "bad_row", f"segments speaks of recording '{recording}', wav.scp does not")
        file = recordings[recording]
        if not isinstance(file, str) or not file:
            return Rejection(key, "bad_row", f"wav.scp: the file of recording '{recording}' cannot be read")
        # An end of -1 is the recording's end.
        return _Clip(
            key,
            self.audio(file),
            recording,
            offset,
            None if float(end) < 0 else duration,
            {},
        )


def _unmatched(key: str) -> Rejection:
    return Rejection(
        key, "unmatched", f"text has a transcript of {key}, wav.scp and segments have no such utterance"
    )
