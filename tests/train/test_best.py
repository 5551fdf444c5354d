"""Validation: sums over batches, and which model is the best of a run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from core.distributed import Ranks
from model.batch import Batch
from recipe.config import load_recipe
from recipe.stages import STAGES
from tests.train.ranks import Server
from tests.train.tiny import workspace
from train.checkpoint import compatibility
from train.validate import ValidationBatch, score_label, validate


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Spoken:
    """A model with given answers and losses."""

    audio_id = None

    def __init__(self, written: list[list[str]], ctc_sums: list[float]):
        self.written, self.ctc_sums = iter(written), iter(ctc_sums)

    def __call__(self, batch: Batch, losses: tuple[str, ...]):
        return SimpleNamespace(sums={"ce": torch.tensor(0.0), "ctc": torch.tensor(next(self.ctc_sums))})

    def ctc_greedy(self, batch: Batch) -> list[str]:
        return next(self.written)

    def inspect(self, batch: Batch) -> dict:
        return {}


def batch_of(rows: int, transcribed: int) -> Batch:
    """Of no rows: the dummy that fills up a rank."""
    dummy, rows = rows == 0, max(rows, 1)
    empty = torch.zeros(rows, 0, dtype=torch.long)
    return Batch(
        torch.zeros(rows, 1600),
        None,
        torch.full((rows,), 1600),
        dummy,
        torch.ones(rows, 1, dtype=torch.long),
        torch.ones(rows, dtype=torch.long),
        torch.arange(rows) < transcribed,
        empty,
        empty,
        empty,
        ids=[str(i) for i in range(rows)],
        tasks=["asr"] * rows,
    )


def test_errors_and_words_are_summed_over_utterances_and_batches():
    """4 of 10 words: 1 substitution, 1 deletion, 1 insertion and 1 word of a one-word clip; not the mean of
    rates (0.52)."""
    references = [["the wall stood tall", "a bird"], ["moon", "green old trees"]]
    written = [["the ball tall", "a bird"], ["noon", "green old trees too"]]
    engine = SimpleNamespace(
        stage=STAGES["alignment"],
        losses={"ctc": 1.0},
        model=Spoken(written, [3.0, 5.0]),
        whole_model=lambda: nullcontext(False),
    )
    batches = [ValidationBatch(batch_of(2, 2), references[0]), ValidationBatch(batch_of(2, 1), references[1])]
    result = validate(engine, batches, None, Ranks(0, 1, 0, 1, "cpu"))
    assert result["wer"] == pytest.approx(4 / 10) and result["words"] == 10
    assert result["loss"] == result["ctc"] == pytest.approx(8 / 3), "of three transcribed utterances"
    assert result["samples"] == [
        pair for r, h in zip(references, written, strict=True) for pair in zip(r, h, strict=True)
    ]


def test_a_batch_that_fills_up_a_rank_counts_nothing():
    engine = SimpleNamespace(
        stage=STAGES["alignment"],
        losses={"ctc": 1.0},
        model=Spoken([["moon"], ["noise"]], [2.0, 100.0]),
        whole_model=lambda: nullcontext(False),
    )
    result = validate(
        engine,
        [ValidationBatch(batch_of(1, 1), ["moon"]), ValidationBatch(batch_of(0, 0), [])],
        None,
        Ranks(0, 1, 0, 1, "cpu"),
    )
    assert result["wer"] == 0 and result["words"] == 1 and result["loss"] == pytest.approx(2.0)


def test_the_weight_of_ctc_is_in_the_validation_loss():
    engine = SimpleNamespace(
        stage=SimpleNamespace(score="ctc"),
        losses={"ce": 1.0, "ctc": 0.7},
        model=Spoken([["moon"]], [3.0]),
        whole_model=lambda: nullcontext(False),
    )
    result = validate(engine, [ValidationBatch(batch_of(1, 1), ["moon"])], None, Ranks(0, 1, 0, 1, "cpu"))
    assert (result["ce"], result["ctc"]) == (0.0, 3.0) and result["loss"] == pytest.approx(0.7 * 3)


def test_named_sets_have_scores_of_their_own_and_the_whole_has_all():
    """Set a: 1 of 2 words wrong, loss 4 / 2; set b: 0 of 3 words, loss 2 / 1; together 1 of 5, 6 / 3."""
    engine = SimpleNamespace(
        stage=STAGES["alignment"],
        losses={"ctc": 1.0},
        model=Spoken([["the ball"], ["a red moon"]], [4.0, 2.0]),
        whole_model=lambda: nullcontext(False),
    )
    batches = [
        ValidationBatch(batch_of(1, 1), ["the wall"], part="a"),
        ValidationBatch(batch_of(1, 1), ["a red moon"], part="b"),
    ]
    result = validate(engine, batches, None, Ranks(0, 1, 0, 1, "cpu"))
    assert (result["a/wer"], result["b/wer"], result["wer"]) == (1 / 2, 0, 1 / 5)
    assert (result["a/loss"], result["b/loss"], result["loss"]) == (4.0, 2.0, 3.0)


def test_several_languages_have_an_error_rate_each():
    """German by words, 1 of 4 and 1 of 2; Chinese by characters, 1 of 4; two spellings are one language."""
    written = [["der hund liegt", "你好世间"], ["das meer"]]
    engine = SimpleNamespace(
        stage=STAGES["alignment"],
        losses={"ctc": 1.0},
        model=Spoken(written, [1.0, 1.0]),
        whole_model=lambda: nullcontext(False),
    )
    batches = [
        ValidationBatch(
            replace(batch_of(2, 2), languages=["de", "zh-CN"]), ["der hund liegt da", "你好世界"]
        ),
        ValidationBatch(replace(batch_of(1, 1), languages=["de_DE"]), ["das haus"]),
    ]
    result = validate(engine, batches, None, Ranks(0, 1, 0, 1, "cpu"))
    assert {name: value for name, value in result.items() if name.startswith("language/")} == {
        "language/de/wer": 2 / 6,
        "language/zh/cer": 1 / 4,
    }
    assert [line.split() for line in result["language_table"].splitlines()[2:]] == [
        ["de", "2", "WER", "33.3", "%"],
        ["zh", "1", "CER", "25.0", "%"],
    ]
    assert score_label("language/de/wer") == "language/de/WER"


def test_a_single_language_has_no_table():
    engine = SimpleNamespace(
        stage=STAGES["alignment"],
        losses={"ctc": 1.0},
        model=Spoken([["moon"]], [1.0]),
        whole_model=lambda: nullcontext(False),
    )
    entry = ValidationBatch(replace(batch_of(1, 1), languages=["en"]), ["moon"])
    result = validate(engine, [entry], None, Ranks(0, 1, 0, 1, "cpu"))
    assert result["language_table"] == "" and not any(name.startswith("language/") for name in result)


def test_languages_are_of_transcripts_where_the_llm_answers():
    """The German translation is no German speech."""
    samples = [
        {"id": str(at), "task": task, "duration": 1.0, "text": text, "lang": lang, "response": text}
        for at, (task, text, lang) in enumerate(
            [("asr", "the wall", "en"), ("translation", "die mauer", "en"), ("asr", "le mur", "fr")]
        )
    ]
    batch = replace(batch_of(3, 3), tasks=["asr", "translation", "asr"], languages=["en", "de", "fr"])
    engine = SimpleNamespace(
        stage=STAGES["sft"],
        losses={"ce": 1.0},
        model=Writes([["the ball", "nein", "le mur"]], [0.0]),
        whole_model=lambda: nullcontext(False),
    )
    entry = ValidationBatch(batch, ["the wall", "die mauer", "le mur"], batch, samples)
    tokenizer = SimpleNamespace(decode=lambda row, skip_special_tokens: row[0])
    result = validate(engine, [entry], tokenizer, Ranks(0, 1, 0, 1, "cpu"))
    assert {name: value for name, value in result.items() if name.startswith("language/")} == {
        "language/en/wer": 0.5,
        "language/fr/wer": 0.0,
    }


class Writes(Spoken):
    """The same for a stage that generates: ids are places in a list of texts."""

    def generate(self, prompts, max_new_tokens, synced_gpus) -> list[list[str]]:
        return [[text] for text in next(self.written)]


def test_tasks_have_the_scores_of_their_metrics():
    """Emotion: 1 of 2 right; translation: chrF as sacrebleu computes it; asr: its words count in WER only."""
    import sacrebleu

    samples = [
        {"id": "1", "task": "emotion", "duration": 1.0, "label": "sad", "response": "sad"},
        {"id": "2", "task": "emotion", "duration": 1.0, "label": "happy", "response": "happy"},
        {
            "id": "3",
            "task": "translation",
            "duration": 1.0,
            "target_lang": "fr",
            "response": "le mur est haut",
        },
        {"id": "4", "task": "asr", "duration": 1.0, "text": "the wall"},
    ]
    written = ["sad", "sad", "le mur est bas", "the wall"]
    model = Writes([written], [0.0])
    engine = SimpleNamespace(
        stage=STAGES["sft"], losses={"ce": 1.0}, model=model, whole_model=lambda: nullcontext(False)
    )
    batch = batch_of(4, 4)
    entry = ValidationBatch(batch, ["sad", "happy", "le mur est haut", "the wall"], batch, samples, "mine")
    tokenizer = SimpleNamespace(decode=lambda row, skip_special_tokens: row[0])
    result = validate(engine, [entry], tokenizer, Ranks(0, 1, 0, 1, "cpu"))
    assert result["accuracy"] == result["mine/accuracy"] == 0.5
    chrf = sacrebleu.corpus_chrf([written[2]], [["le mur est haut"]]).score
    assert result["chrf"] == pytest.approx(chrf) and result["bleu"] > 0
    assert result["wer"] == pytest.approx(2 / 8), "happy and haut, of 8 words"


# ---- the best of a run


@pytest.fixture(scope="module")
def server():
    with Server() as started:
        yield started


@pytest.mark.slow  # starts of real ranks
@pytest.mark.parametrize(("by", "step", "score"), [("wer", 4, 0.3), ("loss", 8, 1.5)])
def test_the_lowest_score_of_a_trained_step_chooses_the_best_model(server, tmp_path, by, step, score):
    """The untrained model's is lower (validation at the start), a NaN is none, and the other score has its
    best elsewhere."""
    folder = workspace(tmp_path / "tiny")
    rates, losses = (
        [0.1, 0.5, 0.3, float("nan"), 0.4, 0.35],
        [1.0, 4.0, 3.0, float("nan"), 1.5, 2.0],
    )  # after steps 0, 2 ... 10
    run = server.start(
        [
            folder / "stage1.yaml",
            f"output={tmp_path}",
            "optim.steps=10",
            "log.validate_every_steps=2",
            "checkpoint.every_steps=100",
            "log.tensorboard=false",
            f"checkpoint.best_by={by}",
        ],
        ranks=1,
        fault=["scores", rates, losses],
    )
    assert run.wait() == [0], run.text()
    best = json.loads((tmp_path / "alignment/model-best/soundwave.json").read_text())
    assert (
        best["step"] == best["best"]["step"] == step
        and best["best"]["score"] == score
        and best["best"]["by"] == by
    )
    noted = json.loads((tmp_path / "alignment/checkpoints/best.json").read_text())
    assert (noted["step"], noted["score"]) == (step, score)
    assert (tmp_path / f"alignment/checkpoints/step-{step:06d}").is_dir(), "kept beside the last ones"


@pytest.mark.slow  # a start of a real rank
def test_validations_without_a_better_score_end_the_stage(server, tmp_path):
    """WER .5 (step 0: not counted), .6, .4, .45, .4 with a higher loss: two in a row after step 2's .4."""
    folder = workspace(tmp_path / "tiny")
    arguments = [
        f"output={tmp_path}",
        "optim.steps=10",
        "optim.stop_after=2",
        "log.validate_every_steps=1",
        "checkpoint.every_steps=100",
        "log.tensorboard=false",
    ]
    run = server.start(
        [folder / "stage1.yaml", *arguments],
        ranks=1,
        fault=["scores", [0.5, 0.6, 0.4, 0.45, 0.4, 0.1], [1.0, 1.0, 1.0, 1.0, 2.0, 1.0]],
    )
    assert run.wait() == [0], run.text()
    stage = tmp_path / "alignment"
    noted = json.loads((stage / "run.json").read_text())
    assert (noted["status"], noted["step"]) == ("done", 4)
    assert "2 validations without a better WER than 40.0 % of step 2 (optim.stop_after)" in noted["reason"]
    assert "step 3: validation WER 45.0 %" in run.text() and "best WER=40.0 %" in run.text()
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["wer"] for line in lines if line["kind"] == "valid"][:3] == [0.5, 0.6, 0.4]
    described = [
        json.loads((stage / name / "soundwave.json").read_text()) for name in ("model", "model-best")
    ]
    assert [one["step"] for one in described] == [4, 2] and described[0]["stopped_after"] == 2
    state = json.loads((stage / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["without_better"] == 2
    assert compatibility.finished(load_recipe(folder / "stage1.yaml", arguments))
    for changed in ("optim.stop_after=3", "optim.stop_after=null"):
        recipe = load_recipe(folder / "stage1.yaml", [*arguments, changed])
        assert not compatibility.finished(recipe), "it continues from its last checkpoint"
