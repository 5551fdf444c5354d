"""Spoken telephone prompts in five languages out of Debian's asterisk-core-sounds packages. Changes when they
do.

`asterisk-core-sounds-XX` has the words, /usr/share/doc/asterisk-core-sounds-XX/core-sounds-XX.txt.gz with
lines `key: text`; `asterisk-core-sounds-XX-wav` has the audio, /usr/share/asterisk/sounds/VOICE/KEY.wav at 8
kHz. The same key in two languages is a translation pair.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import soundfile

VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
# Lines that describe a sound or comment on the reading instead of saying its words.
NOT_WORDS = re.compile(r"[\[\]<>()]|\btone\b|\btones\b|\btono\b|\bbeep\b|silence")


def words_of(path: Path) -> dict[str, str]:
    """key -> text of one core-sounds-XX.txt.gz (UTF-8, or Latin-1 in older files); comments and sounds left
    out."""
    raw = gzip.decompress(path.read_bytes())
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    found = {}
    for line in text.splitlines():
        key, colon, words = (part.strip() for part in line.partition(":"))
        words = " ".join(words.strip(".… ").split()) + (
            "." if words.endswith(".") and not words.endswith("..") else ""
        )
        if (
            colon
            and words
            and not line.startswith(";")
            and not key.startswith("silence")
            and not NOT_WORDS.search(words)
        ):
            found[key] = words
    return found


def read(root: Path) -> list[dict]:
    """Rows of all five languages: id, audio, text, lang, duration (seconds), speaker, key. ROOT: the unpacked
    packages."""
    rows = []
    for lang, voice in VOICES.items():
        for key, text in words_of(
            root / f"usr/share/doc/asterisk-core-sounds-{lang}/core-sounds-{lang}.txt.gz"
        ).items():
            audio = root / "usr/share/asterisk/sounds" / voice / f"{key}.wav"
            if not audio.exists() or "�" in text:
                continue
            rows.append(
                {
                    "id": f"{lang}-{key.replace('/', '-')}",
                    "audio": str(audio),
                    "text": text,
                    "lang": lang,
                    "duration": round(soundfile.info(audio).duration, 3),
                    "speaker": voice,
                    "key": key,
                }
            )
    return rows
