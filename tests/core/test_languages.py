"""The table of languages: Whisper's names and codes, what corpora write, and what is not known."""

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from core.languages import (
    UNSPACED,
    effective_language,
    is_known,
    language_code,
    language_name,
    writes_no_spaces,
)


def test_whisper_s_languages_have_whisper_s_codes():
    assert {name: language_code(name) for name in TO_LANGUAGE_CODE} == TO_LANGUAGE_CODE
    assert {code: language_name(code).lower() for code in LANGUAGES} == LANGUAGES
    assert all(map(is_known, [*LANGUAGES, *TO_LANGUAGE_CODE]))


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("cn", "zh"),
        ("jp", "ja"),
        ("lao", "lo"),
        ("wuu", "wuu"),
        ("cmn_hans_cn", "zh"),
        ("zho", "zh"),
        ("zh-TW", "zh"),
        ("tha", "th"),
        ("khm", "km"),
        ("mya", "my"),
        ("yue_hant_hk", "yue"),
        ("nan-tw", "nan"),
        ("Shanghainese", "wuu"),
        ("deu", "de"),
        ("ger", "de"),
        ("fra", "fr"),
        ("spa", "es"),
        ("por", "pt"),
        ("arb", "ar"),
        ("pes", "fa"),
        ("iw", "he"),
        ("jv", "jw"),
        ("fil_ph", "tl"),
        ("sw_ke", "sw"),
        ("ckb_iq", "ckb"),
        ("Swiss German", "gsw"),
        ("Haitian Creole", "ht"),
        ("Brazilian Portuguese", "pt"),
        (" EN ", "en"),
    ],
)
def test_what_corpora_write_is_brought_to_a_code(written, code):
    assert language_code(written) == code and is_known(written)


@pytest.mark.parametrize("written", ["xx", "Klingon", "qqq", "und", "zz-ZZ"])
def test_an_unknown_language_is_not_taken_for_one_with_spaces(written):
    assert not is_known(written)
    assert effective_language(written, "hello") == effective_language(written, "今天") == "und"


def test_a_missing_language_is_english_where_the_text_is_in_latin_letters():
    assert effective_language(None, "Voilà, 5 €!") == effective_language("", "") == "en"
    for text in ("今天", "привет", "नमस्ते", "a 今"):
        assert effective_language(None, text) == "und"
    assert effective_language("ko_kr", "今天") == "ko"


def test_languages_without_spaces_are_written_in_scripts_without_spaces():
    samples = {
        "zh": "今",
        "yue": "佢",
        "ja": "はカ漢",
        "th": "ก",
        "lo": "ກ",
        "my": "က",
        "km": "ក",
        "shn": "ၵ",
        "nod": "ᨣ",
    }
    assert samples.keys() <= UNSPACED
    assert all(writes_no_spaces(character) for text in samples.values() for character in text)
    assert not any(map(writes_no_spaces, "aéжक한אع5.་"))
