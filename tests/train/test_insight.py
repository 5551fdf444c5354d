"""What a run tells about itself: the report, totals over restarts, the fixed clip, model FLOPs."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import re

import numpy as np
import pytest
import torch
import yaml
from matplotlib import image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.distributed import Ranks
from model.soundwave import Soundwave
from model.stages import STAGES, chosen
from tests.model import tiny
from train import report, telemetry
from train.flops import Flops
from train.gpus import peak_of
from train.telemetry import Telemetry
from train.validate import ValidationBatch, fixed_clip

ALONE = Ranks(0, 1, 0, 1, "cpu")


def metrics(folder, steps: int, **more) -> list[dict]:
    folder.mkdir(parents=True)
    lines = []
    for step in range(steps):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "time": 0.0,
                "loss": 9.0 / (step + 1),
                "ctc": 9.0 / (step + 1),
                "grad_norm": 1.0,
                "lr_adapters": 1e-3,
                "step_seconds": 2.0,
                "data_wait_seconds": 0.5,
                "audio_seconds": 90.0,
                "padding_share": 0.1,
                "audio_seconds_per_second": 45.0,
                "shrink_ratio": 0.2,
                "flops_per_second": 1e12,
                "peak_memory_gib": 3.0,
                "rejected": 1.0,
                "retries": 0.0,
                **more,
            }
        )
    lines[3]["loss"], lines[3]["skipped"] = float("nan"), "loss is nan"
    lines[-1]["passes"] = {"corpus/asr": 1.25}
    lines.append(
        {
            "kind": "valid",
            "step": steps,
            "time": 0.0,
            "loss": 2.0,
            "wer": 0.25,
            "words": 8.0,
            "samples": [["a <b> & c", "a & c"]],
        }
    )
    lines.append({"kind": "event", "step": 5, "time": 0.0, "event": "roll_back"})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    )
    return lines


def test_report_from_metrics_alone(tmp_path, capsys):
    folder = tmp_path / "run" / "alignment"
    metrics(folder, steps=1200)  # beyond what a curve shows
    assert (
        report.main([str(tmp_path / "run")]) == 0 and str(folder / "report.html") in capsys.readouterr().out
    )
    text = (folder / "report.html").read_text()
    pictures = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', text)
    assert {"loss", "throughput", "step time", "padding", "shrink ratio", "rejected data", "memory"} <= {
        n for n, _ in pictures
    }
    for _, png in pictures:
        assert image.imread(io.BytesIO(base64.b64decode(png))).ndim == 3
    assert "://" not in text and "<script" not in text, "one file, for an air-gapped reader"
    cells = dict(re.findall(r"<td>([^<]+)</td><td>([^<]+)</td>", text))
    assert cells["waiting for data"] == "25.00% of the time" and cells["audio"] == "30.00 hours seen"
    assert cells["padding"].startswith("10.0%") and cells["rejected samples, read retries"] == "1200, 0"
    assert cells["steps not applied"] == "1" and cells["epochs of corpus/asr"] == "1.25"
    shown = "first 25.0 % (step 1200), best 25.0 % (step 1200), last 25.0 % (step 1200)"
    assert cells["validation WER"] == shown
    assert "<td>a <del>&lt;b&gt;</del> &amp; c</td><td>a &amp; c</td>" in text and "roll_back" in text
    assert "parts of the loss" not in text, "stage 1 has one loss"
    assert report.main([str(tmp_path / "nothing")]) == 2 and "metrics.jsonl" in capsys.readouterr().err


def test_report_of_all_stages_is_one_page_with_what_the_recipes_change(tmp_path, capsys):
    run = tmp_path / "run"
    for name, more in (("alignment", {}), ("shrinking", {"ce": 2.0})):
        metrics(run / name, steps=20, **more)
        recipe = {"stage": name, "optim": {"steps": 20, "lr_lora": 2e-4}, "data": {"train": []}}
        (run / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        state = {"status": "running", "step": 10, "steps": 20}
        (run / name / "run.json").write_text(json.dumps(state))
    assert report.main([str(run)]) == 0 and str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert text.count("<h1>") == 2 and text.count('alt="parts of the loss"') == 1
    changed = re.findall(r"<tr><td>([\w.]+)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", text)
    steps = ("optim.steps", "20", "4000")
    assert changed == [steps, steps, ("stage", "shrinking", "alignment")]
    assert "<td>time left</td><td>20.0 s</td>" in text  # ten steps of two seconds


def test_words_that_differ_are_marked():
    assert report.compared("I tell you, yes.", "i tell you yes") == ("I tell you, yes.", "i tell you yes")
    assert report.compared("the cat sat", "the dog sat down") == (
        "the <del>cat</del> sat",
        "the <ins>dog</ins> sat <ins>down</ins>",
    )


def test_a_smoothed_curve_is_a_centred_mean_and_keeps_its_gaps():
    values = np.arange(150.0)
    values[70] = np.nan
    smooth = report.smoothed(values)
    assert np.isnan(smooth[70]) and smooth[10] == pytest.approx(10) and smooth[71] == pytest.approx(71.5)
    assert report.smoothed(values[:60]) is not None and len(report.smoothed(values[:60])) == 60


def test_curves_sum_what_is_counted_and_take_the_last_of_repeated_steps():
    lines = [{"step": step, "loss": float(step), "rejected": 2.0} for step in (0, 1, 2, 1, 2, 3)]
    lines[1]["loss"] = float("inf")
    steps, values = report.series(lines, "loss")
    assert steps.tolist() == [0, 1, 2, 3] and values.tolist() == [0, 1, 2, 3]
    assert report.series(lines, "rejected")[1].tolist() == [2, 4, 6, 8]
    assert report.series(lines, "ce")[0].size == 0
    steps, values = report.series([{"step": s, "loss": 1.0 * s} for s in range(5000)], "loss")
    assert len(steps) == report.POINTS and np.allclose(steps, values)


def test_totals_and_lines_survive_a_kill(tmp_path):
    def start(first_step: int) -> Telemetry:
        return Telemetry(tmp_path, ALONE, first_step=first_step, steps=9, stage="test", trackers=[])

    log = start(0)
    for step in range(4):
        log.line("train", step, {"loss": 1.0, "rejected": 2.0, "retries": 1.0})
    log.file.write('{"kind": "train", "step": 4, "rej')  # killed here; the last checkpoint was before step 3
    log.file.flush()
    log = start(3)
    assert log.totals == {"rejected": 6.0, "retries": 3.0}
    log.line("train", 3, {"loss": 1.0, "rejected": 5.0, "retries": 0.0})
    assert log.totals == {"rejected": 11.0, "retries": 3.0}
    log.go_back(2)
    log.line("event", 2, {"event": "roll_back"})
    log.line("train", 2, {"loss": 1.0, "rejected": 1.0})
    assert log.totals == {"rejected": 12.0, "retries": 3.0}, (
        "what the forgotten steps rejected has been rejected"
    )
    log.close()
    start(1).close()  # killed, and resumed from before the roll-back
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 0), ("event", 2)], (
        "each step once; events stay"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Soundwave:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = tiny.config(
        tiny.whisper(folder / "whisper", width=48, heads=4),
        tiny.llm(folder / "llm", "llama", width=64),
        ctc_head="free",
    )
    config.attention_implementation, config.ops.implementation = "eager", "reference"
    return Soundwave.build(config)


def test_the_fixed_clip_has_its_row_and_median_length(model):
    chats = [
        tiny.chat("2 + 2?", "four", audio=False),
        tiny.chat("What?", "the wall"),
        tiny.chat("Say it.", "a"),
    ]
    spoken = tiny.batch(model, chats, [0.9, 0.4], ["the wall", "a"])
    silent = tiny.batch(model, chats[:1], [], [])
    refs = (["four", "the wall", "a"], None)
    one, two = ValidationBatch(silent, ["four"]), ValidationBatch(spoken, *refs)
    assert fixed_clip([one, two], model.audio_id) == (
        1,
        0,
        1,
    )  # 0.4 and 0.9: the upper median
    assert fixed_clip([one], model.audio_id) == (0, 0, -1)


@pytest.mark.parametrize(
    "stage, losses", [("alignment", ("ctc",)), ("shrinking", ("ce", "ctc")), ("sft", ("ce",))]
)
def test_model_flops_are_those_of_the_operations(model, stage, losses):
    """torch counts every matrix product of a forward and backward pass; conversations are of one length, so
    nothing is padded. The tolerance is for what is left out (the look-back's scores), and for the gradient of
    the first LLM layer's input, which stage 3 does not need: of two layers that is something, of thirty
    nothing."""
    model.set_stage(stage)
    model.train()
    chats = [tiny.chat("What is said here, please?", "the wall and the hall")] * 3
    batch = tiny.batch(model, chats, [2.0] * 3, ["the wall"] * 3)
    # The counter does not know SDPA's fused kernel for CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(batch, losses=losses)
        (output.ce_sum + output.ctc_sum if len(losses) == 2 else output.ce_sum + output.ctc_sum).backward()
    counts = counter.get_flop_counts()

    def counted(part: str) -> int:
        return sum(counts[f"Soundwave.{part}"].values())

    flops = Flops.of(model).step(
        int(output.frames), 3, int(output.llm_tokens), 3, batch.ce_count, int(output.kept)
    )
    left_out = 3 * (
        200 * 2 * 16 * 201 + 100 * 2 * 16 * 3 * 48
    )  # mel filters; the first convolution's second frame in two
    assert flops["encoder"] == pytest.approx(counted("encoder") - left_out, rel=0.01), "forward alone"
    assert flops["alignment"] == pytest.approx(counted("alignment"), rel=0.02)
    # The counter gives some of the LLM's backward pass to other parts, so it is held to the whole. The CTC
    # reference counts as what it does: it computes its logits again in backward.
    total = sum(flops.values()) + left_out + counted("ctc_head") - flops["ctc_head"]
    assert total == pytest.approx(sum(counts["Global"].values()), rel=0.04)


@pytest.mark.parametrize(
    "choices",
    [
        {"encoder": "last_1"},
        {"encoder": "all"},
        {"encoder": "all", "adapters": "none", "llm": "none"},
        {"encoder": "lora"},
        {"encoder": "last_1", "llm": "all"},
    ],
)
def test_model_flops_follow_what_is_trained(model, choices):
    """As above; more frames are kept here. What flows below the queries, keys and values of the lowest layer
    is counted, and not needed where LoRA alone learns: of two layers that is something, of thirty nothing."""
    config = copy.deepcopy(model.config)
    config.llm.lora_r = 0 if choices.get("llm") == "all" else 4
    rank = config.encoder.lora_r = 4 if choices["encoder"] == "lora" else 0
    network = Soundwave.build(config)
    network.set_stage(chosen(STAGES["shrinking"], choices))
    network.train()
    chats = [tiny.chat("What is said here, please?", "the wall and the hall")] * 3
    batch = tiny.batch(network, chats, [2.0] * 3, ["the wall"] * 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = network(batch, losses=("ce", "ctc"))
        (output.ce_sum + output.ctc_sum).backward()
    counts = counter.get_flop_counts()
    encoder, alignment, ctc_head, whole = (
        sum(counts[part].values())
        for part in ("Soundwave.encoder", "Soundwave.alignment", "Soundwave.ctc_head", "Global")
    )
    flops = Flops.of(network).step(
        int(output.frames), 3, int(output.llm_tokens), 3, batch.ce_count, int(output.kept)
    )
    left_out = 3 * (200 * 2 * 16 * 201 + 100 * 2 * 16 * 3 * 48)
    unused = 300 * 2 * 3 * 48 * (48 + rank) if rank else 0
    assert flops["encoder"] - unused == pytest.approx(encoder - left_out, rel=0.02)
    assert flops["alignment"] == pytest.approx(alignment, rel=0.02)
    total = sum(flops.values()) - unused + left_out + ctc_head - flops["ctc_head"]
    assert total == pytest.approx(whole, rel=0.05)


def test_peaks_by_device_name():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12 and peak_of("Some other device") is None


def test_logs_carry_no_control_sequences_of_data():
    record = logging.LogRecord(
        "soundwave", logging.WARNING, "", 0, "%s was rejected", ("evil\x1b]0;owned\x07\x1b[2J",), None
    )
    assert (
        telemetry.PrintableFormatter("%(message)s").format(record)
        == r"evil\x1b]0;owned\x07\x1b[2J was rejected"
    )


def test_the_recipe_of_the_report_is_in_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    corpus = {"shards": "a", "weight": None, "tasks": None, "name": None, "share": 0.5, "share_from": 0.0}
    path.write_text(yaml.safe_dump({"seed": 7, "data": {"train": [corpus], "cache_features": None}}))
    assert report.changed_keys(path) == [
        ("data.train", "[{shards: 'a', share: 0.5}]", "[]"),
        ("seed", "7", "0"),
    ]
