"""The words of a text, and which CTC targets spell each word."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.ctc_text import NORMALISATIONS, ctc_target_ids, normalise
from core.spelling import Part, join_words, spell, word_spans
from tests.model import tiny
from tests.model.tokenizers import made, slow


def words_of(text: str, lang: str | None = None) -> list[str]:
    return [text[begin:end] for begin, end in word_spans(text, lang)]


@pytest.mark.parametrize(
    "text, lang, words",
    [
        ("Hello,  world — it’s “OK”.", "en", ["Hello,", "world —", "it’s", "“OK”."]),
        ("- So - yes", "en", ["- So -", "yes"]),
        ("¿Qué? ( ¡No! )", "es", ["¿Qué?", "( ¡No! )"]),
        ("你好，世界", "zh", ["你", "好，", "世", "界"]),
        ("你好，OK。「手机」3.5元", "zh-CN", ["你", "好，", "OK。", "「手", "机」", "3.5", "元"]),
        ("コーヒー", "ja", ["コ", "ー", "ヒ", "ー"]),
        ("สวัสดี ครับ", "th", ["ส", "วั", "ส", "ดี", "ค", "รั", "บ"]),
        ("안녕하세요 여러분", "ko", ["안녕하세요", "여러분"]),
        ("iPhone手机", None, ["iPhone", "手", "机"]),
        ("iPhone手机", "en", ["iPhone手机"]),
        ("...", "en", ["..."]),
        (" \n", "en", []),
        ("", None, []),
    ],
)
def test_words_keep_their_spelling(text, lang, words):
    assert words_of(text, lang) == words


def test_words_join_to_running_text():
    assert join_words(["你", "好，", "世", "界"]) == "你好，世界"
    assert join_words(["Hello,", "world"]) == "Hello, world"
    assert join_words(["我", "love", "你"]) == "我 love 你"


TEXTS = st.lists(
    st.sampled_from(
        [
            "the",
            "The,",
            "it's",
            "it’s",
            "—",
            "你",
            "好，",
            "「",
            "3.5",
            "İx",
            "ΣΑΣ",
            "ß",
            "<|im_end|>",
            "…",
            "é",
            " ",
            "\n",
            "'",
            "\U0001f44d",
        ]
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("slow"))
    return {
        "bytes": tiny.tokenizer(),
        "gemma": made("gemma"),
        "unigram": made("unigram"),
        "slow": slow(folder),
    }


@pytest.mark.parametrize("name", ["bytes", "gemma", "unigram", "slow"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@settings(max_examples=40, deadline=None)
@given(pieces=TEXTS, gap=st.sampled_from(["", " "]), lang=st.sampled_from([None, "en", "zh", "el"]))
@example(pieces=["你", "'", "s"], gap="", lang="zh")
def test_targets_are_the_texts_own_and_each_belongs_to_a_word(
    tokenizers, name, normalisation, pieces, gap, lang
):
    tokenizer = tokenizers[name]
    text = gap.join(pieces)
    spelling = spell(tokenizer, text, normalisation, lang)
    plain = " ".join(normalise(text, normalisation).split())
    assert spelling.ids == ctc_target_ids(tokenizer, plain, "raw")
    assert "".join("".join(spelling.words).split()) == "".join(text.split())
    parts = [part for parts in spelling.parts for part in parts]
    assert [part.place for part in parts] == sorted(part.place for part in parts)
    covered = dict.fromkeys(range(len(spelling.ids)), 0.0)
    for part in parts:
        assert 0 <= part.begin < part.end <= 1
        covered[part.place] += part.end - part.begin
    assert all(share == pytest.approx(1) for share in covered.values())
    for word, parts in zip(spelling.words, spelling.parts, strict=False):
        assert bool(parts) or not normalise(word, normalisation).strip()


def test_targets_belong_to_the_words_that_they_spell():
    words = tiny.tokenizer()
    spelling = spell(words, "The wall, “all”!", "lower_no_punctuation", "en")
    spelled = [words.decode([spelling.ids[part.place] for part in parts]) for parts in spelling.parts]
    assert spelled == [" the", " wall", " all"]


def test_characters_share_a_target():
    pieces = [("<unk>", 0.0), ("▁", -5.0), ("▁你好", -1.0), ("吗", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    spelling = spell(tokenizer, "你好吗", "raw", "zh")
    assert spelling.words == ["你", "好", "吗"] and len(spelling.ids) == 2
    assert spelling.parts == [[Part(0, 0, 0.5)], [Part(0, 0.5, 1)], [Part(1, 0, 1)]]
