"""LibriSpeech and Multilingual LibriSpeech, as their archives unpack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault, is_held_out


class LibriSpeech:
    """ROOT/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its .flac files; PATH is ROOT, or one SUBSET.

    subset: only these, joined by `+` (train-clean-100+train-clean-360); without it, of ROOT, all but dev and test.
    """

    def __init__(self, path: Path, subset: str | None = None):
        wanted = subset.split("+") if subset else None
        if wanted is None and _has_speakers(path):
            self.subsets = [path]
            return
        there = sorted(p for p in path.iterdir() if p.is_dir() and _has_speakers(p))
        self.subsets = [p for p in there if (p.name in wanted if wanted else not is_held_out(p.name))]
        missing = set(wanted or ()) - {p.name for p in self.subsets}
        if there and not wanted and not self.subsets:
            raise CorpusError(f"{path} holds test sets alone: name them, subset={'+'.join(p.name for p in there)}")
        if missing or not self.subsets:
            raise CorpusError(f"{path} holds no LibriSpeech subset {', '.join(sorted(missing))}".rstrip())

    def __iter__(self) -> Iterator[Entry | Fault]:
        for subset in self.subsets:
            for speaker in sorted(p for p in subset.iterdir() if p.is_dir()):
                for chapter in sorted(p for p in speaker.iterdir() if p.is_dir()):
                    transcripts = chapter / f"{speaker.name}-{chapter.name}.trans.txt"
                    if not transcripts.exists():
                        yield Fault(str(transcripts), "bad_row", "a chapter without its transcripts")
                        continue
                    with open(transcripts, encoding="utf-8") as file:
                        for line in file:
                            name, _, text = line.strip().partition(" ")
                            if name:
                                yield Entry(
                                    id=name,
                                    audio=str(chapter / f"{name}.flac"),
                                    text=text,
                                    lang="en",
                                    task="asr",
                                    speaker=speaker.name,
                                    recording=f"{speaker.name}-{chapter.name}",
                                )


def _has_speakers(path: Path) -> bool:
    return any(p.is_dir() and p.name.isdigit() for p in path.iterdir())


class MLS:
    """mls_LANGUAGE/SPLIT/transcripts.txt (`id TAB text`) beside audio/SPEAKER/BOOK/SPEAKER_BOOK_SEGMENT.flac (or .opus).

    PATH is mls_LANGUAGE; split: train, dev or test.
    """

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
        self.folder, self.lang = path / split, lang
        language = path.name.removeprefix("mls_").removesuffix("_opus")
        self.lang = lang or self.LANGUAGES.get(language)
        self.extension = ".opus" if path.name.endswith("_opus") else ".flac"
        if not (self.folder / "transcripts.txt").exists():
            raise CorpusError(f"{self.folder / 'transcripts.txt'} does not exist: give mls_LANGUAGE and split=train, dev or test")

    def __iter__(self) -> Iterator[Entry | Fault]:
        with open(self.folder / "transcripts.txt", encoding="utf-8") as file:
            for place, line in enumerate(file, 1):
                name, tab, text = line.rstrip("\n").partition("\t")
                parts = name.split("_")
                if not tab or len(parts) != 3:
                    yield Fault(f"transcripts.txt:{place}", "bad_row", "not SPEAKER_BOOK_SEGMENT TAB text")
                    continue
                speaker, book, _ = parts
                yield Entry(
                    id=name,
                    audio=str(self.folder / "audio" / speaker / book / (name + self.extension)),
                    text=text.strip(),
                    lang=self.lang,
                    task="asr",
                    speaker=speaker,
                    recording=f"{speaker}_{book}",
                )
