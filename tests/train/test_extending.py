"""Extension points: a loss, a stage and a metric that this file alone defines. Recipes name it in `plugins`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.files import read_lines
from evaluation import compare, score
from evaluation.metrics import METRICS, Metric, register_metric
from evaluation.resampling import interval, paired_test
from model.compressors import Compressor, options_of, register_compressor
from model.losses import Loss, register_loss
from model.stages import Stage, register_stage
from recipe.config import LossConfig, Recipe, RecipeError
from recipe.stages import losses_of
from tests.train.tiny import losses, workspace

PLUGIN = "tests.train.test_extending"
ROOT = Path(__file__).resolve().parents[2]


@register_loss("toy_energy")
class Energy(Loss):
    needs_llm = False

    def numerator(self, state):
        per_clip = state.audio.hidden.float().square().mean(-1).sum(-1) / state.audio.lengths
        return per_clip.sum() * (not state.batch.audio_is_dummy)

    def count(self, batch):
        return 0 if batch.audio_is_dummy else len(batch.audio_lengths)


register_stage(
    Stage(
        name="toy_projector",
        number="B",
        parts=("encoder", "adapters", "llm"),
        trains=("alignment", "shrinking", "lora"),
        losses=("ce", "toy_energy"),
        score="generate",
        without_effect=("optim.lr_ctc_head", "loss.ctc_weight"),
    )
)


def hits(rows: list[dict]) -> np.ndarray:
    return np.array([float(row["prediction"].split() == row["reference"].split()) for row in rows])


@register_metric("toy_digits")
class Digits(Metric):
    tasks = ("toy_digits",)
    columns = ("exact", "digits")

    def score(self, rows, marks):
        found = hits(rows)
        digits = sum(len(row["reference"].split()) for row in rows)
        return {
            "exact": float(found.mean()),
            "exact_ci95": interval(found, np.ones(len(rows))),
            "digits": digits,
        }

    def paired(self, first, second):
        return {"exact": paired_test(hits(first), hits(second), np.ones(len(first)))}

    def show(self, name, value):
        return f"{100 * value:.1f} %" if name == "exact" else super().show(name, value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("extending") / "tiny")


COMMON = [f"plugins=[{PLUGIN}]", "optim.steps=2", "log.tensorboard=false", "log.validate_at_start=false"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_trains_and_is_logged_whatever_the_ranks(tiny, server, tmp_path, ranks):
    """The loss is CTC + 0.5 x energy; the energy is that of the whole global batch."""
    output = tmp_path / "run"
    run = server.start(
        [tiny / "stage1.yaml", *COMMON, f"output={output}", "loss.weights={toy_energy: 0.5}"], ranks=ranks
    )
    assert run.wait() == [0] * ranks, run.text()
    lines = read_lines(output / "alignment" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [0, 1]
    for line in lines:
        assert line["toy_energy"] > 0
        assert line["loss"] == pytest.approx(line["ctc"] + 0.5 * line["toy_energy"], rel=1e-12)
    # The adapter's LayerNorm starts with a gain g < 1 everywhere, so each frame's mean square is g^2.
    assert lines[0]["toy_energy"] == pytest.approx(start_gain(tiny) ** 2, rel=1e-3)
    assert f"plugins:\n- {PLUGIN}" in (output / "alignment" / "recipe.yaml").read_text()


def start_gain(tiny: Path) -> float:
    """min(1, 1 / (RMS of the output embeddings x sqrt(width))), from the LLM's own file (docs/method.md)."""
    from safetensors.torch import load_file

    embeddings = load_file(tiny / "llm" / "model.safetensors")["model.embed_tokens.weight"].double()
    return min(1.0, 1 / (embeddings.square().mean().sqrt().item() * math.sqrt(embeddings.shape[1])))


def test_a_stage_trains_what_it_names(tiny, server, tmp_path):
    output = tmp_path / "run"
    options = ["stage=toy_projector", "model.shrinking.enabled=false", "deepspeed=ds_configs/zero2.json"]
    run = server.start([tiny / "stage1.yaml", *COMMON, *options, f"output={output}"], ranks=1)
    assert run.wait() == [0], run.text()
    assert "stage B (toy_projector): " in run.text()
    folder = output / "toy_projector"
    assert set(losses(folder)) == {0, 1} and (folder / "report.html").exists()
    described = json.loads((folder / "model" / "soundwave.json").read_text())
    assert described["stage"] == "toy_projector" and (folder / "model" / "lora").is_dir()
    assert described["recipe"]["plugins"] == [PLUGIN]


def test_a_metric_scores_compares_and_is_shown(tmp_path, capsys):
    row = {
        "task": "toy_digits",
        "reference": "1 2 3",
        "raw": "",
        "lang": "en",
        "corpus": "c",
        "duration": 1.0,
    }
    files = {"a": ["1 2 3", "1 2 3", "1 2", "9"], "b": ["1 2 3"] * 4}
    for name, answers in files.items():
        rows = [row | {"id": str(n), "prediction": text} for n, text in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in files]
    assert score.main(["--plugins", PLUGIN, *paths]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"toy_digits +\| all +\| +4 +\| 50\.0 % \[0\.\d+, \d\.\d+\] +\| digits 12 ", shown), (
        shown
    )
    assert compare.main(["--plugins", PLUGIN, *paths]) == 0
    assert "+0.500" in capsys.readouterr().out
    assert score.main(["--plugins", "no_such_plugin", *paths]) == 2
    assert "there is no module no_such_plugin" in capsys.readouterr().err


def test_no_two_metrics_share_a_task():
    with pytest.raises(ValueError, match="task 'asr' is scored by 'wer' already"):

        @register_metric("toy_other")
        class Other(Digits):
            tasks = ("asr",)

    assert "toy_other" not in METRICS


@pytest.mark.parametrize(
    ("stage", "weights", "words"),
    [
        (
            "alignment",
            {"toy_enrgy": 1.0},
            "loss.weights: loss 'toy_enrgy' is not known; did you mean 'toy_energy'",
        ),
        ("alignment", {"ce": 1.0}, "the loss 'ce' needs the LLM, which stage 1 (alignment) does not load"),
        ("shrinking", {"ctc": 1.0}, "loss.weights.ctc: its weight is loss.ctc_weight"),
        ("shrinking", {"toy_energy": -1.0}, "loss.weights.toy_energy is -1: must be at least 0"),
        ("shrinkng", {}, "stage 'shrinkng' is not known; did you mean 'shrinking'"),
    ],
)
def test_losses_that_cannot_be_are_refused(stage, weights, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        losses_of(Recipe(stage=stage, loss=LossConfig(weights=weights)))


def test_weights_of_a_stage_and_its_recipe():
    given = LossConfig(ctc_weight=0.7, weights={"toy_energy": 0.5})
    assert losses_of(Recipe(stage="shrinking", loss=given)) == {"ce": 1.0, "ctc": 0.7, "toy_energy": 0.5}
    assert losses_of(Recipe(stage="alignment", loss=given)) == {"ctc": 1.0, "toy_energy": 0.5}
    assert losses_of(Recipe(stage="sft", loss=LossConfig())) == {"ce": 1.0}
    assert losses_of(Recipe(stage="toy_projector")) == {"ce": 1.0, "toy_energy": 1.0}
    assert losses_of(Recipe(stage="sft", loss=LossConfig(weights={"ctc": 0.2}))) == {"ce": 1.0, "ctc": 0.2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": ("encoder", "decoder")},
        {"trains": ("decoder",)},
        {"trains": ()},
        {"losses": ()},
        {"score": "bleu"},
        {"parts": ("encoder", "adapters")},
    ],
)
def test_a_stage_that_cannot_be_is_refused(wrong):
    right = {"name": "toy", "number": "T", "parts": ("encoder", "adapters", "llm"), "trains": ("lora",)}
    with pytest.raises(ValueError, match="stage 'toy'"):
        Stage(**{**right, "losses": ("ce",), "score": "generate", **wrong})


def test_the_page_s_sections_are_short_and_their_examples_run(tmp_path, monkeypatch):
    """Each example of docs/extending.md, at most 30 lines with its text, is a module that can be imported."""
    from core.plugins import load_plugins

    sections = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
    assert [s.splitlines()[0] for s in sections][:4] == ["A loss", "A stage", "A compressor", "A metric"]
    monkeypatch.chdir(tmp_path)
    for section in sections:
        example = re.search(r"^```python\n# (\w+)\.py\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        if not example:
            continue
        lines = [line for line in section.splitlines() if line.strip() and not line.startswith("```")]
        assert len(lines) <= 30, section.splitlines()[0]
        (tmp_path / f"{example[1]}.py").write_text(example[2])
        load_plugins([example[1]])


@register_compressor("toy_halves")
class Halves(Compressor):
    """The mean of two neighbouring frames, times a trained gain."""

    options = {"start": 1.0}

    def __init__(self, config, width, llm_heads, gain):
        super().__init__(config, width, llm_heads, gain)
        self.gain = nn.Parameter(gain * options_of(Halves, config)["start"] * torch.ones(width))

    def forward(self, hidden, lengths, ctc):
        pairs = nn.functional.pad(hidden, (0, 0, 0, hidden.shape[1] % 2)).unflatten(1, (-1, 2))
        frames, lengths = pairs.mean(2) * self.gain, (lengths + 1) // 2
        return frames, lengths, {}, torch.arange(0, hidden.shape[1], 2).expand(len(lengths), -1)


@pytest.mark.parametrize(
    "options, ranks",
    [
        (["model.compressor=toy_halves", "model.compressor_options={start: 0.5}"], 1),
        (["model.compressor=cif", "loss.weights={kl: 0.5}"], 2),
    ],
    ids=["toy", "cif-kl"],
)
def test_a_compressor_trains_and_further_losses_are_added(tiny, server, tmp_path, options, ranks):
    """CIF brings its quantity loss; the KL loss runs the LLM twice in a step, under ZeRO-3."""
    output = tmp_path / "run"
    run = server.start(
        [tiny / "stage1.yaml", *COMMON, *options, "stage=shrinking", "init_from=fresh", f"output={output}"],
        ranks=ranks,
    )
    assert run.wait() == [0] * ranks, run.text()
    lines = [line for line in read_lines(output / "shrinking" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        added = line.get("quantity", 0.0) + 0.5 * line.get("kl", 0.0)
        assert ("quantity" in line) == ("kl" in line) == ("model.compressor=cif" in options)
        assert line["loss"] == pytest.approx(line["ce"] + 0.3 * line["ctc"] + added, rel=1e-9)
        assert line["shrink_ratio"] == pytest.approx(0.5, abs=0.05) or ranks == 2
    stored = json.loads((output / "shrinking" / "model" / "soundwave.json").read_text())["config"]
    assert f"model.compressor={stored['compressor']}" in options


def test_a_loss_of_another_compressor_is_refused():
    recipe = Recipe(stage="shrinking", loss=LossConfig(weights={"quantity": 1.0}))
    with pytest.raises(RecipeError, match="the compressor 'ctc_peaks' computes no loss 'quantity'"):
        losses_of(recipe)
