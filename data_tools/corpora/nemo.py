"""NeMo manifests: JSON lines with audio_filepath."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from core.languages import language_code, language_name
from data_tools.corpora import Entry, Fault


class Nemo:
    """manifest.json(l): audio_filepath, duration, text, and optionally offset, lang, speaker, pred_text (taken as hypothesis).

    A line whose source_lang and target_lang differ is a translation: its text is in the target language (as for Canary).
    Relative paths start from the manifest's folder. The id is the path with the offset (and a translation's language),
    which is what makes a line unique.
    """

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Entry | Fault]:
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for place, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    name, offset = row["audio_filepath"], row.get("offset")
                    duration = row.get("duration")
                    entry_id = Path(name).with_suffix("").as_posix() + (f"@{offset:.3f}" if offset is not None else "")
                    entry = Entry(
                        id=entry_id,
                        audio=str(self.path.parent / name),
                        text=row.get("text"),
                        task="asr",
                        offset=offset,
                        duration=None if duration is None else float(duration),
                        lang=row.get("lang") or row.get("target_lang") or row.get("source_lang"),
                        speaker=None if row.get("speaker") is None else str(row["speaker"]),
                        recording=name,
                        hypothesis=row.get("pred_text"),
                    )
                    source, target = row.get("source_lang"), row.get("target_lang")
                    if source and target and language_code(source) != language_code(target):
                        entry.task, entry.response, entry.text, entry.hypothesis = "translation", entry.text, None, None
                        entry.lang, entry.target_lang, entry.id = source, language_name(target), f"{entry_id}-{target}"
                    yield entry
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    yield Fault(f"{self.path.name}:{place}", "bad_json", f"{type(error).__name__}: {error}")
