"""LibriSpeech and Multilingual LibriSpeech, as their archives unpack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora import CorpusError, Entry, Ignored, Reader, Rejection, is_held_out
from data_tools.text_files import Problem, existing, text_lines


class LibriSpeech(Reader):
    """ROOT/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its .flac files; PATH is ROOT, or one
    SUBSET.

    subset: only these, joined by `+` (train-clean-100+train-clean-360); without it, of ROOT, all but dev and
    test. Clips without a line in the transcripts are reported.
    """

    has_global_ids = True

    def __init__(self, path: Path, subset: str | None = None):
        names = subset.split("+") if subset else None
        if names is None and _has_speakers(path):
            self.subsets = [path]
            return
        folders = sorted(p for p in path.iterdir() if p.is_dir() and _has_speakers(p))
        self.subsets = [p for p in folders if (p.name in names if names else not is_held_out(p.name))]
        missing = set(names or ()) - {p.name for p in self.subsets}
        if folders and not names and not self.subsets:
            raise CorpusError(
                f"{path} holds test sets alone: name them, subset={'+'.join(p.name for p in folders)}"
            )
        if missing or not self.subsets:
            raise CorpusError(f"{path} holds no LibriSpeech subset {', '.join(sorted(missing))}".rstrip())

    def records(self) -> Iterator[tuple[str, Any]]:
        for subset in self.subsets:
            for speaker in sorted(p for p in subset.iterdir() if p.is_dir()):
                for chapter in sorted(p for p in speaker.iterdir() if p.is_dir()):
                    yield from self._chapter(speaker.name, chapter)

    def _chapter(self, speaker: str, chapter: Path) -> Iterator[tuple[str, Any]]:
        transcripts = existing(chapter / f"{speaker}-{chapter.name}.trans.txt")
        if not transcripts.exists():
            yield "", Rejection(str(transcripts), "bad_row", "a chapter without its transcripts")
            return
        clips = {
            name.removesuffix(".flac")
            for name in os.listdir(chapter)
            if name.endswith(".flac") and name[0] != "."
        }
        for place, line in text_lines(transcripts, self.encoding):
            if isinstance(line, Problem):
                yield f"{transcripts.name}:{place}", line
                continue
            name, _, text = line.strip().partition(" ")
            if name:
                clips.discard(name)
                yield name, (name, text, speaker, chapter)
        for name in sorted(clips):
            yield name, Rejection(name, "unmatched", f"{transcripts.name} has no line of {name}.flac")

    def sample(self, record: tuple[str, str, str, Path], where: str) -> Entry:
        name, text, speaker, chapter = record
        return Entry(
            id=name,
            audio=str(chapter / f"{name}.flac"),
            text=text,
            lang="en",
            task="asr",
            speaker=speaker,
            recording=f"{speaker}-{chapter.name}",
        )


def _has_speakers(path: Path) -> bool:
    return path.is_dir() and any(p.is_dir() and p.name.isdigit() for p in path.iterdir())


class MLS(Reader):
    """mls_LANGUAGE/SPLIT/transcripts.txt (`id TAB text`) beside audio/SPEAKER/BOOK/SPEAKER_BOOK_SEGMENT.flac
    (or .opus).

    PATH is mls_LANGUAGE; split: train, dev or test. Clips without a transcript are counted.
    """

    has_global_ids = True
    LANGUAGES = {
        "english": "en",
        "german": "de",
        "dutch": "nl",
        "french": "fr",
        "spanish": "es",
        "italian": "it",
        "portuguese": "pt",
        "polish": "pl",
    }

    def __init__(self, path: Path, split: str = "train", lang: str | None = None):
        self.folder = path / split
        language = path.name.removeprefix("mls_").removesuffix("_opus")
        self.lang = lang or self.LANGUAGES.get(language)
        self.extension = ".opus" if path.name.endswith("_opus") else ".flac"
        self.transcripts = existing(self.folder / "transcripts.txt")
        if not self.transcripts.exists():
            raise CorpusError(
                f"{self.folder / 'transcripts.txt'} does not exist: give mls_LANGUAGE and split=train, dev "
                f"or test"
            )
        if self.lang is None:
            folder_names = ", ".join(f"mls_{name}" for name in self.LANGUAGES)
            raise CorpusError(
                f"{path}: the folder's name is none of {folder_names}: give the language, lang=de for example"
            )

    def records(self) -> Iterator[tuple[str, Any]]:
        count = 0
        for place, line in text_lines(self.transcripts, self.encoding):
            count += 1
            yield f"transcripts.txt:{place}", line
        clips = sum(
            name.endswith(self.extension) for _, _, names in os.walk(self.folder / "audio") for name in names
        )
        if clips > count:
            yield "", Ignored("clips that transcripts.txt has no line of", clips - count)

    def sample(self, line: str, where: str) -> Entry | Rejection:
        name, tab, text = line.partition("\t")
        parts = name.split("_")
        if not tab or len(parts) != 3:
            return Rejection(where, "bad_row", "not SPEAKER_BOOK_SEGMENT TAB text")
        speaker, book, _ = parts
        return Entry(
            id=name,
            audio=str(self.folder / "audio" / speaker / book / (name + self.extension)),
            text=text.strip(),
            lang=self.lang,
            task="asr",
            speaker=speaker,
            recording=f"{speaker}_{book}",
        )
