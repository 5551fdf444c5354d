"""The paired comparison of two prediction files."""

import json

import pytest

from evaluation import compare
from evaluation.metrics import METRICS, Metric, register_metric


def write(path, predictions, task="asr", reference="red green blue yellow"):
    path.write_text(
        "".join(
            json.dumps({"id": str(i), "task": task, "reference": reference, "prediction": p, "raw": p}) + "\n"
            for i, p in enumerate(predictions)
        )
    )
    return path


def test_clear_and_absent_differences(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", ["red green blue yellow"] * 30)
    bad = write(tmp_path / "bad.jsonl", ["red green"] * 30 + ["more"])
    result = compare.compare(good, bad)["tasks"]["asr"]["metrics"]
    assert result["wer"]["difference"] == pytest.approx(0.5) and result["wer"]["p_value"] < 0.001
    assert compare.compare(good, good)["tasks"]["asr"]["metrics"]["wer"]["p_value"] == 1
    assert compare.main([str(good), str(bad), "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["only_second"] == 1
    printed = capsys.readouterr().out
    assert "only in the second: 1" in printed
    wer = next(line for line in printed.splitlines() if "wer" in line)
    assert [cell.strip() for cell in wer.split("|")[1:7]] == ["asr", "wer, %", "30", "0.0", "50.0", "+50.0"]
    written = json.loads((tmp_path / "out.json").read_text())["tasks"]["asr"]["metrics"]["wer"]
    assert written["second"] == pytest.approx(0.5)


def test_translation_uses_sacrebleu(tmp_path):
    reference = "the small cat sat on the large mat"
    good = write(tmp_path / "g.jsonl", [reference] * 20, "translation", reference)
    bad = write(tmp_path / "b.jsonl", ["the small cat stood on a mat"] * 20, "translation", reference)
    metrics = compare.compare(good, bad)["tasks"]["translation"]["metrics"]
    assert metrics["bleu"]["first"] == pytest.approx(100) and metrics["bleu"]["p_value"] < 0.01
    assert metrics["chrf"]["difference"] < 0


def test_a_metric_without_a_paired_test_cannot_be_registered():
    class Keywords(Metric):
        columns = ("keywords", "words")

        def score(self, rows, marks):
            return {"keywords": 0.0, "words": 0}

    with pytest.raises(TypeError, match="paired"):
        register_metric("keywords")(Keywords)
    assert "keywords" not in METRICS


def test_directions_of_several_tokenizers_are_compared_by_themselves(tmp_path):
    both = [("Chinese", "今天天气很好我们去公园"), ("French", "le petit chat est sur le tapis")]
    rows = [
        {
            "id": f"{to}-{i}",
            "task": "translation",
            "lang": "en",
            "prompt": f"Translate the speech into {to}.",
            "reference": text,
            "prediction": text,
        }
        for i in range(3)
        for to, text in both
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = compare.compare(file, file)["tasks"]
    assert {task: part["utterances"] for task, part in tasks.items()} == {
        "translation en-fr": 3,
        "translation en-zh": 3,
    }
    assert all(part["metrics"]["bleu"]["first"] == pytest.approx(100) for part in tasks.values())


def test_other_references_are_refused(tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", ["x"]), write(tmp_path / "b.jsonl", ["x"], reference="else")
    assert compare.main([str(first), str(second)]) == 2
    assert "same shards" in capsys.readouterr().err


def test_silence_is_no_part_of_the_comparison(tmp_path):
    first, second = (tmp_path / name for name in ("a.jsonl", "b.jsonl"))
    for file, words in ((first, "some words here"), (second, "")):
        rows = [
            {"id": "1", "task": "asr", "reference": "", "prediction": words},
            {"id": "2", "task": "asr", "reference": "a b", "prediction": "a b"},
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = compare.compare(first, second)["tasks"]["asr"]["metrics"]
    assert metrics["wer"]["first"] == metrics["wer"]["second"] == 0
    for file in (first, second):
        file.write_text(file.read_text().splitlines()[0] + "\n")
    assert compare.compare(first, second)["tasks"]["asr"]["metrics"] == {}


def test_rows_that_are_there_twice_are_compared_once(tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", ["red green blue yellow"] * 3), tmp_path / "b.jsonl"
    second.write_text(first.read_text() * 2)
    assert compare.main([str(first), str(second)]) == 0
    assert f"note: {second}: 3 rows are there twice and counted once" in capsys.readouterr().out


def test_a_clip_asked_for_two_tasks_is_compared_in_each(tmp_path):
    rows = [{"id": "1", "task": task, "reference": "a", "prediction": "a"} for task in ("asr", "quiz")]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.compare(file, file)["tasks"].keys() == {"asr", "quiz"}
