"""Mozilla Common Voice and what is built on it: CoVoST 2's speech translation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from core.languages import language_name
from data_tools.corpora import CorpusError, Entry, Fault
from data_tools.corpora.table import rows


class CommonVoice:
    """LANG/SPLIT.tsv beside LANG/clips/*.mp3; PATH is the LANG folder of a release, split e.g. train, dev, test, validated."""

    def __init__(self, path: Path, split: str = "train", lang: str | None = None):
        self.table, self.clips, self.lang = path / f"{split}.tsv", path / "clips", lang or path.name
        if not self.table.exists():
            raise CorpusError(
                f"{self.table} does not exist: give the language's folder and split=train, dev, test, validated ..."
            )

    def __iter__(self) -> Iterator[Entry | Fault]:
        for place, row in rows(self.table, quoted=False):
            if not row.get("path"):
                yield Fault(f"{self.table.name}:{place}", "bad_row", "no path")
                continue
            yield Entry(
                id=Path(row["path"]).stem,
                audio=str(self.clips / row["path"]),
                text=row.get("sentence"),
                lang=self.lang,
                task="asr",
                speaker=row.get("client_id") or None,
            )


class CoVoST:
    """covost_v2.SRC_TGT.SPLIT.tsv (path, sentence, translation, client_id) and the Common Voice clips that it speaks of.

    PATH is the table; clips: folder of the mp3 files (default: clips beside it). The two languages are in the file's name, and
    in the corpus' name unless another is given: a clip has one id whatever it is translated into.
    """

    def __init__(self, path: Path, clips: str | None = None):
        self.table, self.clips = path, Path(clips).absolute() if clips else path.parent / "clips"
        parts = path.name.split(".")
        if len(parts) < 3 or "_" not in parts[1]:
            raise CorpusError(f"{path}: the name must be covost_v2.SRC_TGT.SPLIT.tsv, for its languages")
        source, target = parts[1].split("_", 1)
        self.source, self.target = source.split("-")[0], language_name(target)
        self.corpus = f"{parts[0]}.{parts[1]}"

    def __iter__(self) -> Iterator[Entry | Fault]:
        # The official script writes the splits with a backslash before every quote and backslash of a sentence.
        for place, row in rows(self.table, quoted=False, escape="\\"):
            if not row.get("path") or not row.get("translation"):
                yield Fault(row.get("path") or f"{self.table.name}:{place}", "bad_row", "no path or no translation")
                continue
            yield Entry(
                id=Path(row["path"]).stem,
                audio=str(self.clips / row["path"]),
                text=_without_quotes(row.get("sentence") or "") or None,
                lang=self.source,
                target_lang=self.target,
                task="translation",
                prompt=f"Please translate the following audio into {self.target}.",
                response=row["translation"],
                speaker=row.get("client_id") or None,
            )


def _without_quotes(sentence: str) -> str:
    """Without the quotes around all of it, which some sentences have, and CSV's double ones within; others stay."""
    inner = sentence[1:-1]
    whole = sentence == f'"{inner}"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else sentence
