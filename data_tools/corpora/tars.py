"""WebDataset shards as a corpus: packing again in other sizes, codecs or order, and taking in what others packed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from core.audio import EXTENSIONS
from data_tools.corpora import ENTRY_FIELDS, CorpusError, Entry, Fault

_TEXT_EXTENSIONS = ("txt", "text", "transcript")


class Shards:
    """PATH is a folder of .tar files or one of them; samples are KEY.flac (wav, mp3, m4a ...) with KEY.json and/or KEY.txt.

    KEY.json may be this project's (ids, tasks and texts are kept) or any object with a text under text, sentence or
    transcript. Reading is by member headers: audio is not touched.
    """

    def __init__(self, path: Path):
        self.tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not self.tars:
            raise CorpusError(f"{path} holds no .tar file")

    def __iter__(self) -> Iterator[Entry | Fault]:
        for tar in self.tars:
            try:
                with tarfile.open(tar) as archive:
                    yield from self._samples(archive, tar)
            except tarfile.TarError as error:
                yield Fault(tar.name, "truncated", f"{tar}: {error}")

    def _samples(self, archive: tarfile.TarFile, tar: Path) -> Iterator[Entry | Fault]:
        key, parts = None, {}
        for member in archive:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if name != key and parts:
                yield self._sample(key, parts, tar)
                parts = {}
            key = name
            extension = extension.lower()
            if extension in EXTENSIONS:
                parts["audio"] = f"tar:{tar}#{member.offset_data}+{member.size}.{extension}"
            elif extension == "json" or extension in _TEXT_EXTENSIONS:
                parts[extension] = archive.extractfile(member).read()
        if parts:
            yield self._sample(key, parts, tar)

    def _sample(self, key: str, parts: dict, tar: Path) -> Entry | Fault:
        where = f"{tar.name}:{key}"
        try:
            record = json.loads(parts["json"]) if "json" in parts else {}
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            return Fault(where, "bad_json", str(error))
        values = {
            name: record[name]
            for name in ENTRY_FIELDS
            if record.get(name) is not None and name not in ("audio", "offset", "group")
        }
        if "text" not in values:
            text = next((parts[extension].decode(errors="replace") for extension in _TEXT_EXTENSIONS if extension in parts), None)
            values["text"] = (
                text
                if text is not None
                else next(
                    (record[name] for name in ("sentence", "transcript", "transcription") if isinstance(record.get(name), str)),
                    None,
                )
            )
        if "audio" not in parts and not record.get("messages") and not record.get("response"):
            return Fault(where, "bad_row", "no audio member")
        values["id"] = str(values.get("id") or key)
        return Entry(audio=parts.get("audio"), **values)
