"""The one normaliser and the one error rate, against jiwer on Whisper's normaliser, a plain edit distance and
written values."""

import unicodedata

import jiwer
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from core.languages import effective_language
from core.text import count_errors, describe, error_rate, normalise, says_nothing, units, words
from train.validate import word_errors

ENGLISH = [
    ("Mr. Smith's colour, okay?", "mister smith's color is okay"),
    ("He won't pay $20 million", "he will not pay twenty million dollars"),
    ("Hmm, uh, well", "well well"),
    ("(laughs) it's the 3rd one", "it is the third one"),
    ("naïve café", "naive cafe"),
    ("one two three", "1 2 3"),
    ("hmm", "hello there"),
    ("I love New York", "I love new work"),
]


def test_english_scores_are_those_of_whisper_s_normaliser():
    """Published numbers: they must not move."""
    english = EnglishTextNormalizer()
    pairs = [tuple(" ".join(english(text).split()) for text in pair) for pair in ENGLISH]
    references, hypotheses = zip(*pairs, strict=True)
    whole = jiwer.process_words(list(references), list(hypotheses))
    for lang in ("en", "en-US", "eng", "English", None):
        counted = count_errors(*zip(*ENGLISH, strict=True), [lang] * len(ENGLISH))
        assert counted.kinds == {kind: getattr(whole, kind) for kind in counted.kinds}
        assert counted.errors.sum() / counted.units.sum() == pytest.approx(whole.wer)
    letters = count_errors(*zip(*ENGLISH, strict=True), ["en"] * len(ENGLISH), "character")
    assert letters.errors.sum() / letters.units.sum() == pytest.approx(
        jiwer.cer(list(references), list(hypotheses))
    )


@given(st.text(max_size=30), st.sampled_from(["fr", "ru", "de", "hi", "zh", "th"]))
@settings(max_examples=60, deadline=None)
def test_whisper_s_own_rule_is_whisper_s_own(text, lang):
    theirs = BasicTextNormalizer(split_letters=lang in ("zh", "th"))(text)
    assert normalise(text, lang, "whisper") == " ".join(theirs.split())


@given(
    st.text(st.characters(exclude_categories=("M", "Cs")), max_size=30),
    st.sampled_from(["fr", "ru", "de", "zh"]),
)
@settings(max_examples=60, deadline=None)
def test_text_without_marks_is_normalised_as_by_whisper(text, lang):
    plain = normalise(text, lang, "whisper")
    if not regex.search(r"\p{M}|\u0640", unicodedata.normalize("NFKC", text.lower())):
        assert normalise(text, lang) == plain


@pytest.mark.parametrize(
    ("lang", "reference", "other"),
    [
        ("hi", "की", "का"),
        ("hi", "दिन", "दीन"),
        ("bn", "কি", "কী"),
        ("ta", "கல்", "கால்"),
        ("te", "కల", "కాల"),
        ("th", "มา", "ม้า"),
        ("lo", "ມາ", "ມ້າ"),
        ("my", "က", "ကာ"),
        ("km", "ក", "កា"),
        ("dv", "ދަ", "ދު"),
        ("yo", "ọkọ́", "ọkọ̀"),
        ("ne", "कि", "की"),
    ],
)
def test_marks_that_tell_words_apart_count(lang, reference, other):
    assert error_rate(reference, other, lang) > 0 and error_rate(reference, reference, lang) == 0
    if lang != "yo":  # in Latin letters: counts as English where the language is not said
        assert error_rate(reference, other, None) > 0


@pytest.mark.parametrize(
    ("lang", "pointed", "plain"),
    [
        ("ar", "مُحَمَّد", "محمد"),
        ("ar", "كـــتاب", "كتاب"),
        ("fa", "کِتاب", "کتاب"),
        ("ur", "اُردُو", "اردو"),
        ("he", "שָׁלוֹם", "שלום"),
        ("ru", "за́мок", "замок"),
        ("tr", "İstanbul", "istanbul"),
        ("fr", "❤️ bonjour", "bonjour"),
        ("de", "1️⃣ gut", "1 gut"),
    ],
)
def test_marks_that_most_text_leaves_out_do_not_count(lang, pointed, plain):
    assert normalise(pointed, lang) == normalise(plain, lang) == plain
    if lang in ("ar", "he"):
        assert normalise(pointed, lang, "keep") != normalise(plain, lang, "keep")


def test_words_of_mixed_scripts():
    assert words("iPhone手机 很好", "zh") == [*"iphone手机很好"]
    assert units("iPhone手机 很好", "zh", "mixed") == ["iphone", "手", "机", "很", "好"]
    assert (
        units("我用Python3写code", "fr", "mixed")
        == units("我用Python3写code", "und", "word")
        == ["我", "用", "python3", "写", "code"]
    )
    assert words("เก้าอี้", "th") == ["เ", "ก้", "า", "อี้"], "a grapheme with its marks is one unit"
    assert units("héllo wörld", "fr", "character") == [*"héllo wörld"] and units(
        "你 好", "zh", "character"
    ) == ["你", "好"]
    assert [error_rate("iPhone手机", "iphone手表", lang) for lang in ("zh", "xx")] == [
        pytest.approx(1 / 8),
        pytest.approx(1 / 3),
    ]


@pytest.mark.parametrize("lang", ["cn", "zh", "wuu", "yue", "xx", None])
def test_one_wrong_character_is_not_a_wrong_sentence(lang):
    assert error_rate("你好世界", "你好世间", lang) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("lang", "reference", "early", "late"),
    [
        ("zh", "今天天气很好我们去公园", "一", "今天天气很好我们去公元"),
        ("ja", "今日は雨です", "は", "今日わ雨です"),
        ("th", "สวัสดีครับ", "ก", "สวัสดีคับ"),
        ("lo", "ສະບາຍດີ", "ກ", "ສະບາຍດ"),
        ("my", "မင်္ဂလာပါ", "က", "မင်္ဂလာပ"),
        ("km", "សួស្តី", "ក", "សួស្ត"),
    ],
)
def test_validation_sees_progress_in_scripts_without_spaces(lang, reference, early, late):
    """With WER by spaces every wrong sentence scored 1 and the first step stayed the best."""
    for langs in ([lang], None):
        worse, better = (word_errors([reference], [text], langs) for text in (early, late))
        assert better[0] / better[1] < worse[0] / worse[1] <= 1


def test_validation_counts_as_evaluation_does():
    references, hypotheses = map(list, zip(*ENGLISH, strict=True))
    counted = count_errors(references, hypotheses, ["en"] * len(references))
    assert word_errors(references, hypotheses, ["en"] * len(references)) == (
        counted.errors.sum(),
        counted.units.sum(),
    )
    assert word_errors(["", "[noise]", "a b"], ["words", "words", "a b"]) == (0, 2), (
        "silence has no error rate"
    )
    assert word_errors([""], ["words"]) == (0, 0) and word_errors([], []) == (0, 0)


@pytest.mark.parametrize("text", ["", "  ", "...", "[noise]", "(silence)", "<unk> [laughter]", "♪♪"])
def test_references_that_say_nothing(text):
    assert says_nothing(text) and not says_nothing(text + " a")


def test_a_reference_that_the_normaliser_empties_still_says_something():
    """ "hmm" is speech: what is written for it counts as ever in the error rate."""
    assert not says_nothing("hmm") and not says_nothing("(one) two")
    assert word_errors(["hmm", "a b"], ["hello there", "a b"], ["en", "en"]) == (2, 2)


def test_score_files_say_how_text_was_normalised():
    assert [
        describe("en").split(" (")[0],
        describe("hi").split(" (")[0],
        describe("zh").split(" (")[0],
        describe("xx").split(" (")[0],
        describe("hi", "whisper").split(" (")[0],
    ] == [
        "whisper-english",
        "whisper-basic, combining marks kept",
        "whisper-basic by character, combining marks kept",
        "whisper-basic by script, combining marks kept",
        "whisper-basic",
    ]
    assert effective_language("hi", "") == "hi"
