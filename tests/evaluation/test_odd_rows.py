"""Scores of rows out of the ordinary: silence, duplicates, other systems' rows, unknown languages, answers of
symbols."""

import json

import pytest
from sacrebleu.metrics import BLEU

from evaluation import score
from evaluation.metrics import translation


def silent(prediction: str, **more) -> dict:
    return {"id": prediction, "task": "asr", "lang": "en", "reference": "", "prediction": prediction, **more}


def test_what_is_written_for_silence_is_counted_by_the_minute():
    """20 words over 5 silences of 6 s: 40 a minute, and no error rate."""
    rows = [silent("thank you for watching", duration=6.0) | {"id": i} for i in range(5)]
    scores = score.score_rows(rows)["asr"]
    assert scores["wer"] is scores["cer"] is scores["mer"] is None and "wer_ci95" not in scores
    assert scores["silence"] == {
        "utterances": 5,
        "insertions": 20,
        "minutes": 0.5,
        "insertions_per_minute": 40.0,
    }
    assert (
        "WER none: no words" in (shown := score.table(score.score_rows(rows)))
        and "5 silent: 40.0 words inserted a minute" in shown
    )
    without = score.score_rows([silent("a b")])["asr"]["silence"]
    assert without["insertions"] == 2 and without["minutes"] is without["insertions_per_minute"] is None


def test_silence_does_not_blow_up_the_rate_of_a_small_set():
    spoken = {
        "id": "b",
        "task": "asr",
        "lang": "fr",
        "reference": "bonjour le monde",
        "prediction": "bonjour le monde",
    }
    for noise in ("", "[bruit]", "..."):
        scores = score.score_rows([silent("a b c d e f g h") | {"lang": "fr", "reference": noise}, spoken])[
            "asr"
        ]
        assert scores["wer"] == 0 and scores["wer_ci95"] == (0, 0) and scores["silence"]["insertions"] == 8
    assert score.score_rows([silent("a b") | {"reference": "hmm"}, spoken])["asr"]["wer"] == pytest.approx(
        2 / 3
    ), "speech, as ever"


def test_scores_hold_the_mixed_error_rate():
    row = {"id": "1", "task": "asr", "lang": "zh", "reference": "我用Python写", "prediction": "我用Java写"}
    scores = score.score_rows([row])["asr"]
    assert scores["mer"] == pytest.approx(1 / 4) and scores["wer"] == pytest.approx(6 / 9)


@pytest.mark.parametrize(
    ("reference", "prediction", "same"),
    [
        ("(B)", "(C)", 0),
        ("(B)", "B", 1),
        ("(B)", "b.", 1),
        ("[dog]", "[cat]", 0),
        ("[dog]", "dog", 1),
        ("hmm", "", 0),
        ("Hmm.", "hmm", 1),
        ("-5", "5", 0),
        ("-5", "−5", 1),
        ("-5", "minus five", 1),
        ("3-5", "3 5", 1),
        ("x + y", "x - y", 0),
        ("x < 3", "x > 3", 0),
        ("C++", "C", 0),
        ("C#", "C", 0),
        ("+5", "5", 1),
        ("yes", "Yes!", 1),
        ("three", "3", 1),
        ("20%", "20 percent", 1),
        ("", "", 1),
        ("", "x", 0),
        ("<a>", "<b>", 0),
        ("1.5", "15", 0),
        ("(A)", "I do not know (sorry)", 0),
        ("colour", "color", 1),
    ],
)
def test_exact_answers_are_equal_in_what_they_say(reference, prediction, same):
    row = {"id": "1", "task": "quiz", "lang": "en", "reference": reference, "prediction": prediction}
    assert score.score_rows([row])["quiz"]["exact"] == same


def test_labels_are_compared_as_they_are_matched():
    """A corpus that writes one class in two ways."""
    rows = [
        {"id": str(i), "task": "sound", "label": label, "reference": label, "prediction": "a dog bark"}
        for i, label in enumerate(["Dog_bark", "dog bark", "dog-bark", "cat"])
    ]
    scores = score.score_rows(rows)["sound"]
    assert scores["accuracy"] == 0.75 and scores["recall"] == {"cat": 0.0, "dog bark": 1.0}


CHINESE = [
    ("今天天气很好，我们去公园散步。", "今天天气不错，我们去公园走走。"),
    ("他昨天买了一本新书。", "他昨天买了一本书。"),
    ("请把门关上。", "请关上门。"),
    ("会议将于明天上午九点开始。", "会议明天上午九点开始。"),
]


@pytest.mark.parametrize(
    "said",
    [
        {"prompt": "把音频翻译成中文。"},
        {"prompt": "translate the audio into chinese."},
        {"prompt": "English-to-Chinese:"},
        {"target_lang": "cn"},
        {"target_lang": "Mandarin"},
        {"target_lang": "qqq"},
        {},
    ],
)
def test_bleu_s_tokenizer_is_not_guessed_from_a_prompt_s_wording(said):
    rows = [
        {"id": str(i), "task": "translation", "lang": "en", "reference": r, "prediction": p, **said}
        for i, (r, p) in enumerate(CHINESE)
    ]
    scores = score.score_rows(rows)["translation"]
    expected = BLEU(tokenize="zh").corpus_score([p for _, p in CHINESE], [[r for r, _ in CHINESE]]).score
    assert scores["bleu"] == pytest.approx(expected) and "tok:zh" in scores["bleu_signature"]


@pytest.mark.parametrize(
    ("reference", "tokenizer"),
    [
        ("今日は雨です", "char"),
        ("สวัสดี", "char"),
        ("안녕 세상", "13a"),
        ("le chat", "13a"),
        ("", "13a"),
        ("The city of 北京 is large", "13a"),
        ("iPhone很好用真的", "zh"),
    ],
)
def test_the_script_of_a_reference_has_its_tokenizer(reference, tokenizer):
    assert translation.bleu_tokenizer({"reference": reference}) == tokenizer
    assert translation.bleu_tokenizer({"reference": reference, "target_lang": "Thai"}) == "char", (
        "what the data says comes first"
    )


def test_one_answer_in_latin_letters_does_not_split_a_test_set():
    rows = [
        {
            "id": str(i),
            "task": "translation",
            "lang": "en",
            "reference": "今天很好" if i else "OK",
            "prediction": "今天",
        }
        for i in range(20)
    ]
    assert "tok:zh" in score.score_rows(rows)["translation"]["bleu_signature"]
    mixed = score.score_rows(
        [row | {"reference": "le chat"} if i % 2 else row for i, row in enumerate(rows)]
    )["translation"]
    assert mixed["bleu"] is None and "target_lang" in mixed["bleu_note"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {
    "id": "1",
    "corpus": "c",
    "task": "asr",
    "lang": "en",
    "reference": "red green blue",
    "prediction": "red green blue",
}


def test_rows_that_are_there_twice_count_once(tmp_path, capsys):
    wrong = GOOD | {"id": "2", "prediction": "x y z"}
    assert score.main([str(write(tmp_path / "p.jsonl", [*[GOOD] * 9, wrong]))]) == 0
    result = json.loads((tmp_path / "p.scores.json").read_text())
    assert result["utterances"] == 2 and result["tasks"]["asr"]["wer"] == pytest.approx(0.5)
    assert "note: 8 rows are there twice and counted once" in capsys.readouterr().out
    other = GOOD | {"task": "quiz"}  # one clip, another question
    assert score.score_file(write(tmp_path / "q.jsonl", [GOOD, other]))["utterances"] == 2
    assert score.main([str(write(tmp_path / "r.jsonl", [GOOD, wrong, wrong | {"prediction": "a"}]))]) == 2
    assert "line 3: c/2 of task asr is there twice and differs from line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "2", "reference": "a"}, "has no prediction"),
        ({"id": "2", "prediction": "a"}, "has no reference"),
        (GOOD | {"id": "2", "prediction": None}, "has no prediction"),
        (GOOD | {"id": "2", "reference": None, "task": "translation"}, "has no reference"),
        ([1], "is no JSON object"),
        ("text", "is no JSON object"),
        (GOOD | {"id": None}, "has no id"),
        ({"prediction": "a", "reference": "b"}, "has no id"),
        (GOOD | {"id": "2", "duration": "3"}, "duration is '3', not a number"),
        (GOOD | {"id": "2", "frames": [1]}, "frames is [1], not a number"),
        (GOOD | {"id": "2", "prediction": ["a"]}, "prediction is no text"),
        (GOOD | {"id": "2", "lang": {}}, "lang is no text"),
        (GOOD | {"id": "2", "choices": "A"}, "choices is no list"),
    ],
)
def test_rows_of_other_systems_are_refused_by_line(tmp_path, capsys, row, said):
    file = write(tmp_path / "p.jsonl", [GOOD, row])
    assert score.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}, line 2") and said in error and error.count("\n") == 1


def test_partial_rows_of_other_systems_are_scored(tmp_path):
    rows = [
        GOOD | {"id": 1, "frames": 3, "duration": 1.0},
        {"id": 2, "task": "quiz", "reference": 3, "prediction": 3.0, "label": 3},
        {"id": "3", "reference": "a", "prediction": ""},
    ]
    result = score.score_file(write(tmp_path / "p.jsonl", rows))
    assert result["utterances"] == 3 and result["tasks"]["asr"]["length"] == {}


def test_languages_that_are_not_known_are_counted(tmp_path, capsys):
    rows = [
        GOOD | {"id": str(i), "lang": lang, "reference": "今天很好", "prediction": "今天很坏"}
        for i, lang in enumerate(["xx", "xx", "qq", "zh"])
    ]
    assert score.main([str(write(tmp_path / "p.jsonl", rows))]) == 0
    assert "note: 3 rows have a lang that is not known ('qq', 'xx')" in capsys.readouterr().out
    assert json.loads((tmp_path / "p.scores.json").read_text())["tasks"]["asr"]["wer"] == pytest.approx(0.25)


def test_marks_are_an_option(tmp_path):
    file = write(tmp_path / "p.jsonl", [GOOD | {"lang": "hi", "reference": "की", "prediction": "का"}])
    found = {}
    for marks in ("script", "keep", "whisper"):
        assert score.main([str(file), "--marks", marks]) == 0
        found[marks] = json.loads((tmp_path / "p.scores.json").read_text())
    assert {marks: result["tasks"]["asr"]["wer"] for marks, result in found.items()} == {
        "script": 1,
        "keep": 1,
        "whisper": 0,
    }
    assert (
        found["whisper"]["marks"] == "whisper"
        and "combining marks kept" in found["script"]["tasks"]["asr"]["normaliser"]["hi"]
    )
