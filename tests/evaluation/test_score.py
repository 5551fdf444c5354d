"""Scores from predictions: normaliser, error rates, intervals, answer parsing, the command."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer as PackageNormalizer

from core.languages import language_code
from evaluation import score
from evaluation.metrics import accuracy, error_rates, metric_of
from evaluation.normalise import normalise
from evaluation.resampling import interval, paired_test
from evaluation.tasks import (
    lettered_choices,
    parse_choice,
    parse_letter,
    reference_of,
    target_language,
)

SENTENCES = [
    "Mr. O'Neil won't pay $20 million, will he?",
    "The colour of twenty-one aeroplanes",
    "Uh, she's gone... to St. Ives!",
    "one oh one dalmatians",
    "(laughs) it's the 3rd one",
    "naïve café œuvre",
    "",
]


def test_english_normaliser_equals_transformers():
    theirs = EnglishTextNormalizer(PackageNormalizer().standardize_spellings.mapping)
    for sentence in SENTENCES:
        assert normalise(sentence, "en") == " ".join(theirs(sentence).split())
    assert normalise("The colour", "en") == "the color"  # the spelling map is really there


@given(st.text(max_size=40), st.sampled_from(["fr", "ru", "de"]))
@settings(max_examples=50, deadline=None)
def test_basic_normaliser_equals_transformers(text, lang):
    assert normalise(text, lang, "whisper") == " ".join(BasicTextNormalizer()(text).split())


def test_unspaced_scripts_are_split():
    assert {normalise("你好，世界", lang) for lang in ("zh-CN", "cmn_hans_cn", "Chinese")} == {"你 好 世 界"}


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("zh-CN", "zh"),
        ("cmn", "zh"),
        ("cmn_hans_cn", "zh"),
        ("chinese", "zh"),
        ("Simplified Chinese", "zh"),
        ("Cantonese", "yue"),
        ("nan-tw", "nan"),
        ("English", "en"),
        ("eng", "en"),
        ("en_us", "en"),
        ("pt-BR", "pt"),
        ("nb", "no"),
        ("xx", "xx"),
        ("", None),
        ("Klingon", "klingon"),
        (None, None),
    ],
)
def test_a_language_is_known_by_what_corpora_call_it(said, code):
    assert language_code(said) == code


def test_characters_of_an_unspaced_language_are_counted_without_the_normaliser_s_spaces():
    rows = [
        {"id": "1", "lang": "zh", "reference": "我爱你", "prediction": "我恨你"},
        {"id": "2", "lang": "en", "reference": "a b", "prediction": "a c"},
    ]
    assert [error_rates.score_wer([row])["cer"] for row in rows] == [
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    ]
    assert error_rates.score_wer(rows)["cer"] == pytest.approx(2 / 6)


def edit_distance(a: list, b: list) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@given(
    st.lists(st.tuples(st.text("abc ", max_size=12), st.text("abc ", max_size=12)), min_size=1, max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_error_counts_equal_a_plain_edit_distance(pairs):
    rows = [{"reference": a, "prediction": b, "lang": "fr"} for a, b in pairs]
    for characters in (False, True):
        errors, units, kinds = error_rates.word_counts(rows, characters=characters)
        for i, (a, b) in enumerate(pairs):
            split = (lambda s: list(" ".join(s.split()))) if characters else str.split
            assert (errors[i], units[i]) == (edit_distance(split(a), split(b)), len(split(a)))
        assert sum(kinds.values()) == errors.sum()


def test_interval_agrees_with_the_binomial():
    hits = np.zeros(1000)
    hits[:200] = 1
    low, high = interval(hits, np.ones(1000), samples=2000)
    half = 1.96 * (0.2 * 0.8 / 1000) ** 0.5
    assert low == pytest.approx(0.2 - half, abs=0.004) and high == pytest.approx(0.2 + half, abs=0.004)


def test_paired_test_agrees_with_full_enumeration():
    rng = random.Random(1)
    first = [rng.randint(0, 4) for _ in range(10)]
    second = [max(0, x - rng.randint(0, 2)) for x in first]
    gaps = np.array(second) - np.array(first)
    sums = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in itertools.product([-1, 1], repeat=10)
    ]
    exact = np.mean([s >= abs(gaps.sum()) for s in sums])
    result = paired_test(first, second, [5] * 10)
    assert result["p_value"] == pytest.approx(exact, abs=0.02)
    assert result["difference"] == pytest.approx(gaps.sum() / 50)
    assert paired_test(first, first, [5] * 10)["p_value"] == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("happy", "happy"),
        ("The speaker is HAPPY.", "happy"),
        ("She sounds joyful", "happy"),
        ("not happy but sad", "sad"),
        ("happy or sad", None),
        ("unhappy", None),
        ("It isn't sad", None),
        ("", None),
        ("an angry voice, rather than a sad one", "angry"),
        ("not very happy", None),
        ("not a very happy voice", None),
        ("She isn't really happy, but sad", "sad"),
        ("It isn’t at all sad", None),
        ("No, very happy", "happy"),
        ("The emotion is 'sad'.", "sad"),
        ("‘happy’", "happy"),
    ],
)
def test_parse_emotion(answer, expected):
    assert parse_choice(answer, ["happy", "sad", "angry"]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("female", "female"),
        ("It is a woman.", "female"),
        ("a man", "male"),
        ("The speaker is male, not female", "male"),
        ("It is a man's voice.", "male"),
        ("It's a woman's voice", "female"),
        ("It’s not a man’s voice", None),
        ("a man's or a woman's voice", None),
    ],
)
def test_parse_gender(answer, expected):
    assert parse_choice(answer, ["male", "female"]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "a dog"),
        ("B. a dog", "a dog"),
        ("(C)", "a cat"),
        ("The answer is A.", "a man"),
        ("A man speaks", "a man"),
        ("A dog barks", "a dog"),
        ("Answer: C", "a cat"),
        ("a cat and a dog", None),
        ("D", None),
        ("A. a man\nB. a dog\nAnswer: B", "a dog"),
        ("**B**", "a dog"),
        ('"B"', "a dog"),
        ("The answer is **B**.", "a dog"),
        ("The correct answer is B because it barks", "a dog"),
        ("Answer: A\nNo. Answer: Option C", "a cat"),
        ("B. This is better than option A.", "a dog"),
        ("A, since option B is wrong", "a man"),
        ("The answer is A dog", "a dog"),
        ("The answer is not B.", None),
        ("The wrong answer is A.", None),
        ("b", "a dog"),
        ("(c)", "a cat"),
        ("B is correct.", "a dog"),
        ("B is the right answer", "a dog"),
        ("I choose B", "a dog"),
        ("It's B.", "a dog"),
        ("My answer would be: C", "a cat"),
        (r"\boxed{B}", "a dog"),
        ("I pick a dog", "a dog"),
        ("A is wrong, B is correct", "a dog"),
        # several letters, a list of the options, denials
        ("A, B", None),
        ("(A) or (B)", None),
        ("A/B", None),
        ("A and B", None),
        ("Answer: A, C", None),
        ("Both A and C are correct", None),
        ("The answer is either A or B", None),
        ("A\nB", None),
        ("A. a man\nB. a dog", None),
        ("A. a man B. a dog C. a cat", None),
        ("A. a man\nB. a dog\nC. a cat\n\nI choose C", "a cat"),
        ("(A) a man, (B) a dog, (C) a cat. It barks, so B.", "a dog"),
        ("The correct answer isn't (A); it's (C).", "a cat"),
        ("Not A. B.", "a dog"),
        ("B, not A", "a dog"),
        ("Not B but C", "a cat"),
        ("neither A nor B, so C", "a cat"),
        ("Option A is not correct; option B is.", "a dog"),
        ("I would not choose B", None),
        ("The answer can't be A", None),
        ("(A) is incorrect. (B) is right.", "a dog"),
        ("Options A, B and C are plausible, but the answer is C.", "a cat"),
        ("[B]", "a dog"),
        ("B) a dog", "a dog"),
    ],
)
def test_parse_letter(answer, expected):
    assert parse_letter(answer, ["a man", "a dog", "a cat"]) == expected


def test_class_names_are_answered_in_words():
    names = ["dog", "clock_alarm", "crying-baby", "DogBark"]
    rows = [
        {"id": name, "task": "sound", "label": name, "reference": name, "prediction": answer}
        for name, answer in zip(names, ["dog", "a clock alarm", "Crying baby.", "dog bark"], strict=True)
    ]
    assert score.score_rows(rows)["sound"]["accuracy"] == 1


@pytest.mark.parametrize(
    "label, right", [("a dog", 1), ("A dog", 1), ("B", 1), ("b", 1), ("C", 0), ("a bird", 0), ("D", 0)]
)
def test_the_label_of_lettered_options_is_given_by_words_or_by_letter(label, right):
    row = {
        "id": "1",
        "task": "quiz",
        "label": label,
        "reference": label,
        "prediction": "B",
        "choices": ["a man", "a dog", "a cat"],
    }
    scores = score.score_rows([row])
    assert scores["quiz"]["accuracy"] == right
    stray = label in ("a bird", "D")
    assert scores["quiz"].get("labels_not_among_choices", 0) == stray
    assert ("1 labels are no choice" in score.table(scores)) == stray


def test_free_references_are_no_choices():
    shared = {"task": "chat", "corpus": "c"}
    rows = [
        {
            "id": "1",
            "label": "happy",
            "reference": "happy",
            "prediction": "Yes, the speaker is happy.",
            **shared,
        },
        {"id": "2", "reference": "Yes", "prediction": "Yes", **shared},
    ]
    scores = score.score_rows(rows)["chat"]
    assert scores["labelled"] == 1 and scores["accuracy"] == 1 and scores["unparsed"] == 0
    asr = [{"id": str(i), "task": "asr", "reference": f"words {i}", "prediction": ""} for i in range(5)]
    assert all(row["labels"] == [] for row in accuracy.with_labels(asr, asr)), (
        "nothing that grows with the square of a test set"
    )


def test_a_group_is_scored_as_it_is_within_the_whole():
    rows = [
        {
            "id": str(i),
            "task": "emotion",
            "lang": lang,
            "label": label,
            "reference": label,
            "prediction": answer,
        }
        for i, (lang, label, answer) in enumerate(
            [("en", "happy", "happy or neutral"), ("en", "sad", "sad"), ("de", "neutral", "neutral")]
        )
    ]
    scores = score.score_rows(rows)["emotion"]
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert {name: part["accuracy"] for name, part in scores["groups"].items()} == {
        "lang de": 1,
        "lang en": 0.5,
    }


def test_exact_answers_are_compared_in_their_own_language():
    row = {"id": "1", "task": "chat", "reference": "schön", "prediction": "schon"}
    assert [score.score_rows([row | {"lang": lang}])["chat"]["exact"] for lang in ("de", "en")] == [0, 1]


def test_reference_and_metric_by_task():
    assert reference_of({"task": "asr", "text": "hi", "label": "x"}) == "hi"
    assert reference_of({"task": "chain", "label": "yes", "response": "Answer: yes"}) == "Answer: yes"
    assert reference_of({"task": "emotion", "text": "hi", "label": "sad"}) == "sad"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert reference_of({"task": "chat", "messages": turns}) == "a"
    assert metric_of([{"task": "asr"}]) == "wer" and metric_of([{"task": "translation"}]) == "bleu"
    assert metric_of([{"task": "quiz", "label": "x"}]) == "accuracy"
    assert metric_of([{"task": "instruct", "label": "x"}, {"task": "instruct"}]) == "answer"
    assert metric_of([{"task": "chat"}, {"task": "chat", "choices": ["a", "b"]}]) == "answer"


def test_chain_scores_transcript_and_answer():
    reference = "Transcription: Red green blue.\nAnswer: 3"
    shared = {"task": "chain", "reference": reference}
    rows = [
        {"id": "1", "label": "3", "prediction": "Transcription: red green\nAnswer: 3", **shared},
        {"id": "2", "prediction": "transcript: Red, green, blue\nanswer: B-L-U-E", **shared},
        {"id": "3", "label": "3", "prediction": "red green blue", **shared},
    ]
    result = score.score_rows(rows)["chain"]
    assert result["wer"] == pytest.approx(4 / 9) and result["malformed"] == 1
    assert result["exact"] == pytest.approx(1 / 3) and result["accuracy"] == 0.5 and result["labelled"] == 2


def test_prompts_tell_target_and_choices():
    assert target_language({"prompt": "Translate the speech into French."}) == "fr"
    assert target_language({"prompt": "What is said?"}) is None
    assert lettered_choices("Which?\nA. a man\nB. a dog ") == ["a man", "a dog"]
    assert lettered_choices("A. Smith asked") == [] and lettered_choices("B. x\nA. y") == []


def test_translations_are_grouped_by_direction():
    rows = [
        {
            "id": str(i),
            "task": "translation",
            "lang": lang,
            "prompt": f"Translate the speech into {to}.",
            "reference": "a b c d",
            "prediction": "a b c d",
        }
        for i, (lang, to) in enumerate([("fr", "English"), ("en", "French"), ("en", "French")])
    ]
    assert {
        name: part["utterances"] for name, part in score.score_rows(rows)["translation"]["groups"].items()
    } == {"direction en-fr": 2, "direction fr-en": 1}


@pytest.mark.parametrize("turned", [1, -1])
def test_directions_of_several_tokenizers_have_no_common_bleu(turned):
    """It would depend on which row comes first."""
    rows = [
        {
            "id": "1",
            "task": "translation",
            "lang": "en",
            "prompt": "Translate the speech into Chinese.",
            "reference": "今天天气很好我们去公园",
            "prediction": "今天天气很好我们去学校",
        },
        {
            "id": "2",
            "task": "translation",
            "lang": "en",
            "prompt": "Translate the speech into French.",
            "reference": "le petit chat est sur le tapis",
            "prediction": "le petit chat est sur un tapis",
        },
    ][::turned]
    scores = score.score_rows(rows)
    whole = scores["translation"]
    assert whole["bleu"] is None and "13a, zh" in whole["bleu_note"] and whole["chrf"] > 0
    assert "tok:zh" in whole["groups"]["direction en-zh"]["bleu_signature"]
    assert "tok:13a" in whole["groups"]["direction en-fr"]["bleu_signature"]
    assert "by direction" in score.table(scores)


def test_bleu_of_a_model_that_hardly_ever_matches_has_an_interval():
    rows = [
        {"task": "translation", "id": str(i), "reference": "the cat sat on the mat", "prediction": "zzz"}
        for i in range(6)
    ]
    rows[0]["prediction"] = rows[0]["reference"]  # only some resamples hold it
    low, high = score.score_rows(rows)["translation"]["bleu_ci95"]
    assert low < high


def test_bleu_is_sacrebleus():
    rows = [
        {
            "task": "translation",
            "id": str(i),
            "reference": f"the cat number {i} sat on the mat",
            "prediction": f"a cat number {i} sat on mats",
        }
        for i in range(5)
    ]
    result = score.score_rows(rows)["translation"]
    expected = BLEU().corpus_score([r["prediction"] for r in rows], [[r["reference"] for r in rows]])
    assert result["bleu"] == pytest.approx(expected.score)
    assert "tok:13a" in result["bleu_signature"]


def test_command_scores_by_task_and_corpus(tmp_path, capsys):
    rows = [
        {
            "id": "1",
            "corpus": "a",
            "task": "asr",
            "lang": "en",
            "reference": "red green",
            "prediction": "red",
            "duration": 2.0,
            "frames": 50,
            "kept": 5,
        },
        {
            "id": "2",
            "corpus": "b",
            "task": "asr",
            "lang": "en",
            "reference": "hello there",
            "prediction": "Hello, there!",
            "duration": 2.0,
            "frames": 50,
            "kept": 15,
        },
        {
            "id": "3",
            "corpus": "a",
            "task": "gender",
            "reference": "male",
            "label": "male",
            "prediction": "a man",
        },
        {
            "id": "4",
            "corpus": "a",
            "task": "gender",
            "reference": "female",
            "label": "female",
            "prediction": "a man",
        },
    ]
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + '{"id": "5", "ref'
    )  # the last line was cut by a kill
    assert score.main([str(file)]) == 0
    scores = json.loads((tmp_path / "p.scores.json").read_text())["tasks"]
    assert scores["asr"]["wer"] == pytest.approx(1 / 4)
    assert scores["asr"]["groups"]["corpus b"]["wer"] == 0
    assert scores["asr"]["length"]["kept_share"] == pytest.approx(0.2)
    assert scores["asr"]["length"]["kept_per_second"] == pytest.approx(5.0)
    assert scores["gender"]["accuracy"] == 0.5
    assert "WER" in capsys.readouterr().out


def test_command_refuses_what_it_cannot_score(tmp_path, capsys):
    assert score.main([str(tmp_path / "none.jsonl")]) == 2
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"id": \n{"id": "1"}\n')
    assert score.main([str(broken)]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error and "line 1 is not JSON" in error


def test_a_translation_s_target_is_what_its_row_says():
    rows = (
        {"target_lang": "Chinese"},
        {"target_lang": "ja"},
        {"prompt": "Put it into French."},
        {"prompt": "Put it into French.", "target_lang": "german"},
        {"target_lang": "zh-CN"},
        {"target_lang": "Mandarin Chinese"},
        {"prompt": "Translate what is said in English to Chinese"},
        {"prompt": "Listen to Mary. Translate this into Chinese."},
        {"prompt": "Translate into Simplified Chinese."},
        {"prompt": "Listen to English speech, and say it in German."},
        {},
    )
    assert [target_language(row) for row in rows] == [
        "zh",
        "ja",
        "fr",
        "de",
        "zh",
        "zh",
        "zh",
        "zh",
        "zh",
        "de",
        None,
    ]
