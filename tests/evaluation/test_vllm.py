"""Predictions with the LLM in another process: those of torch, whatever happens to the process.

Without vLLM's environment the process is tests/serving/transformers_worker.py, which speaks the same protocol.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evaluation import run
from evaluation.predictions import read_rows
from soundwave import vllm
from tests.evaluation.test_run import command

STAND_IN = Path(__file__).resolve().parents[1] / "serving" / "transformers_worker.py"


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(vllm, "WORKER", STAND_IN)
    return ["--backend", "vllm", "--vllm-python", sys.executable, "--vllm-rows", "3"]


def rows(out: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "wall"} for row in read_rows(out)]


def test_predictions_are_those_of_torch_also_after_the_process_has_died(
    folders, packed, tmp_path, stand_in, monkeypatch, capsys
):
    more = ["--task", "asr", "translation", "--batch-seconds", "3"]
    right, out = tmp_path / "torch.jsonl", tmp_path / "vllm.jsonl"
    assert run.main(command(folders / "shrinking", packed, right, *more)) == 0
    answer, asked = vllm.VLLM.answer, []

    def dies_at_the_sixth(self, embeddings, **options):
        asked.append(embeddings)
        if len(asked) == 6:
            self.process.kill()
        return answer(self, embeddings, **options)

    monkeypatch.setattr(vllm.VLLM, "answer", dies_at_the_sixth)
    assert run.main(command(folders / "shrinking", packed, out, *more, *stand_in)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: vLLM has ended: run the same command again to continue"
    )
    first = read_rows(tmp_path / "vllm.rank-0.jsonl")
    assert 0 < len(first) < 6
    monkeypatch.setattr(vllm.VLLM, "answer", answer)
    assert run.main(command(folders / "shrinking", packed, out, *more, *stand_in)) == 0
    assert rows(out) == rows(right) and len(rows(out)) == 9
    assert [row["wall"] for row in read_rows(out) if row["id"] == first[0]["id"]] == [first[0]["wall"]]
    assert read_rows(out.with_suffix(".rejected.jsonl")) == read_rows(right.with_suffix(".rejected.jsonl"))
    # bf16 answers differ by rounding: one file holds one backend's.
    assert run.main(command(folders / "shrinking", packed, right, *more, *stand_in)) == 2
    assert "backend was null, is 'vllm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--backend", "vllm", "--decode", "joint"], "decodes greedily"),
        (["--backend", "vllm", "--sample"], "decodes greedily"),
        (["--vllm-python", "python3"], "needs --backend vllm"),
        (["--backend", "vllm", "--vllm-rows", "0"], "--vllm-rows must be at least 1"),
    ],
)
def test_wrong_commands_are_one_line(folders, packed, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        run.main(command(folders / "shrinking", packed, tmp_path / "p.jsonl", *more))
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, python, message",
    [
        ("alignment", sys.executable, "has no LLM: leave --backend vllm out"),
        ("shrinking", "missing/python", "make setup-vllm"),
    ],
)
def test_what_vllm_cannot_answer_is_one_line(folders, packed, tmp_path, capsys, stage, python, message):
    more = ["--backend", "vllm", "--vllm-python", python]
    assert run.main(command(folders / stage, packed, tmp_path / "p.jsonl", *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_gpu_s_free_memory_and_number_are_handed_on(monkeypatch):
    device = vllm.torch.device("cuda", 1)
    monkeypatch.setattr(vllm.torch.cuda, "mem_get_info", lambda _: (60 << 30, 80 << 30))
    assert vllm.gpu_options(device) == ["--gpu-share", "0.675"]  # 0.9 x 60 / 80
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert vllm.gpu_environment(device) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert vllm.gpu_environment(device) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert vllm.gpu_options(vllm.torch.device("cpu")) == [] and vllm.gpu_environment(None) == {}
