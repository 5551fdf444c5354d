"""Mozilla Common Voice and what is built on it: CoVoST 2's speech translation."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.languages import language_name
from data_tools.corpora import CorpusError, Entry, Reader, Rejection
from data_tools.corpora.beside import Beside
from data_tools.text_files import existing, table_rows

# Common Voice's names of its languages, of which the folder of a language has one.
_LOCALES = frozenset(
    "ab ace ady af am an ar arn as ast az ba bas bax be bew bg bn br bxr byv ca ckb cnh co cs cv cy da dag "
    "dar de dv dyu "
    "el en eo es esu et eu fa ff fi fo fr fur fy-NL ga-IE gl gn gom gsw guc gv ha he hi hil hr hsb ht hu "
    "hy-AM hyw ia id "
    "ie ig is it izh ja jbo jv ka kaa kab kbd ki kk km kmr kn knn ko koi kpv kw ky lb lg lij ln lo lt ltg "
    "lus lv lzz mai "
    "mdf mfe mg mhr mk ml mn mni mos mr mrj ms mt my myv nan-tw nb-NO nd ne-NP nhe nhi nl nn-NO nr nso nv ny "
    "nyn oc om or "
    "os pa-IN pap-AW pl ps pt quc quy qxp rm-sursilv rm-vallader ro ru rw sah sat sc scn sco sd sdh shi si "
    "sk skr sl sn "
    "snk snv so sq sr ss ssw st su sv-SE sw syr ta te tg th ti tig tk tl tn to tok tr trv ts tsn tt tw ty "
    "tyv tzm udm ug "
    "uk ur uz vec vep vi vmw vot wo xh xho yi yo yue zgh zh-CN zh-HK zh-TW zu zul zza".split()
)


class CommonVoice(Reader):
    """LANG/SPLIT.tsv beside LANG/clips/*.mp3; PATH is the LANG folder of a release, split e.g. train, dev,
    test, validated.

    The language is the table's column `locale`, else the folder's name where that is one of Common Voice's.
    Durations are those of clip_durations.tsv, where it is there. Clips that the table does not name
    are counted.
    """

    has_global_ids = True

    def __init__(self, path: Path, split: str = "train", lang: str | None = None):
        self.path, self.clips, self.given, self.beside = path, path / "clips", lang, Beside()
        self.table = existing(path / f"{split}.tsv")
        if not self.table.exists():
            raise CorpusError(f"{self.table} does not exist: {self._what_exists()}")

    def records(self) -> Iterator[tuple[str, Any]]:
        self.beside.clear()
        for place, row in table_rows(
            self.table, quoted=False, encoding=self.encoding, required=("path", "sentence")
        ):
            yield f"{self.table.name}:{place}", row
        yield from self.beside.left(self.table.name)

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection:
        if not row["path"]:
            return Rejection(where, "bad_row", "no path")
        audio = str(self.clips / row["path"])
        self.beside.name(audio)
        return Entry(
            id=Path(row["path"]).stem,
            audio=audio,
            text=row["sentence"],
            lang=self.given or row.get("locale") or self._of_folder(),
            task="asr",
            duration=self._durations.of(row["path"]),
            speaker=row.get("client_id") or None,
        )

    @functools.cached_property
    def _durations(self) -> _Durations:
        return _Durations(existing(self.path / "clip_durations.tsv"))

    def _what_exists(self) -> str:
        """What to give in place of a folder and split that have no table."""
        names = {table.name.partition(".")[0] for table in self.path.glob("*.tsv*")}
        splits = sorted(names - {"clip_durations", "reported"})
        if splits:
            return f"split= is one of {', '.join(splits)}"
        languages = sorted(name for name in _LOCALES if (self.path / name).is_dir())
        if languages:
            return f"give the language's folder: {', '.join(str(self.path / name) for name in languages[:3])}"
        return "give the language's folder and split=train, dev, test, validated ..."

    def _of_folder(self) -> str:
        if self.path.name not in _LOCALES:
            raise CorpusError(
                f"{self.path}: '{self.path.name}' is no language of Common Voice, and {self.table.name} has "
                f"no column 'locale': "
                "give the language's folder, or its code (lang=fr)"
            )
        return self.path.name


class _Durations:
    """Seconds of clips by name, of a release's clip_durations.tsv (clip, duration[ms]): 12 bytes a clip."""

    def __init__(self, path: Path):
        hashes, milliseconds = array("q"), array("f")
        if path.exists():
            for _, row in table_rows(path, "\t", quoted=False, required=("clip", "duration[ms]")):
                if isinstance(row, dict) and row["duration[ms]"].isdecimal():
                    hashes.append(hash(row["clip"]))
                    milliseconds.append(int(row["duration[ms]"]))
        order = np.argsort(np.array(hashes, np.int64), kind="stable")
        self._hashes = np.array(hashes, np.int64)[order]
        self._milliseconds = np.array(milliseconds, np.float32)[order]

    def of(self, clip: str) -> float | None:
        """Return the seconds of a clip; None where they are not known."""
        wanted = hash(clip)
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or self._hashes[place] != wanted:
            return None
        return round(float(self._milliseconds[place]) / 1000, 3) or None


class CoVoST(Reader):
    """covost_v2.SRC_TGT.SPLIT.tsv (path, sentence, translation, client_id) and the Common Voice clips that it
    speaks of.

    PATH is the table; clips: folder of the mp3 files (default: clips beside it). The two languages are in the
    file's name, and in the corpus' name unless another is given: a clip has one id whatever it is translated
    into. Clips that the table does not name are counted.
    """

    has_global_ids = True

    def __init__(self, path: Path, clips: str | None = None):
        self.table, self.clips = path, Path(clips).absolute() if clips else path.parent / "clips"
        parts = path.name.split(".")
        if len(parts) < 3 or "_" not in parts[1]:
            raise CorpusError(f"{path}: the name must be covost_v2.SRC_TGT.SPLIT.tsv, for its languages")
        source, target = parts[1].split("_", 1)
        self.source, self.target = source.split("-")[0], language_name(target)
        self.corpus, self.beside = f"{parts[0]}.{parts[1]}", Beside()

    def records(self) -> Iterator[tuple[str, Any]]:
        # The official script writes the splits with a backslash before every quote and backslash of a
        # sentence.
        required = ("path", "sentence", "translation")
        self.beside.clear()
        for place, row in table_rows(
            self.table, "\t", False, escape="\\", encoding=self.encoding, required=required
        ):
            yield f"{self.table.name}:{place}", row
        yield from self.beside.left(self.table.name)

    def sample(self, row: dict[str, str], where: str) -> Entry | Rejection:
        path = row["path"]
        audio = str(self.clips / path)
        if path:
            self.beside.name(audio)
        if not path or not row["translation"]:
            return Rejection(path or where, "bad_row", "no path or no translation")
        return Entry(
            id=Path(path).stem,
            audio=audio,
            text=_without_quotes(row["sentence"]) or None,
            lang=self.source,
            target_lang=self.target,
            task="translation",
            prompt=f"Please translate the following audio into {self.target}.",
            response=row["translation"],
            speaker=row.get("client_id") or None,
        )


def _without_quotes(sentence: str) -> str:
    """Without the quotes around all of it, which some sentences have, and CSV's double ones within; others
    stay."""
    inner = sentence[1:-1]
    whole = sentence == f'"{inner}"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else sentence
