"""The LLM that vLLM gets: as it was trained, whatever trained it. vLLM itself: tests/serving/test_vllm.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import artifact
from model.config import LLMConfig
from model.soundwave import Soundwave
from model.stages import STAGES, chosen
from soundwave.vllm import llm_folder
from tests.model import tiny

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return tiny.whisper(root / "whisper"), tiny.llm(root / "llm", "llama")


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dora": True},
        {"lora_dora": True, "lora_init": "pissa", "lora_rslora": True},
        {"lora_modules_to_save": ["lm_head", "norm"]},
        {"lora_r": 0},
    ],
)
def test_vllm_gets_the_llm_as_it_was_trained(bases, options, tmp_path):
    config = tiny.config(*bases)
    config.llm = LLMConfig(**{"name": bases[1], "lora_r": 4, **options})
    model = Soundwave.build(config).eval()
    model.set_stage(chosen(STAGES["sft"], {"llm": "lora" if config.llm.lora_r else "all"}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    artifact.save(model, tmp_path / "model")
    folder = llm_folder(artifact.load(tmp_path / "model"), tmp_path / "model", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    torch.testing.assert_close(found, model.llm(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)
    original = AutoModelForCausalLM.from_pretrained(bases[1])(input_ids=IDS).logits
    assert float((found - original).abs().max()) > 1e-2


def test_an_untrained_llm_is_taken_from_its_own_folder(bases, tmp_path):
    config = tiny.config(*bases)
    config.llm = LLMConfig(name=bases[1], lora_r=0)
    artifact.save(Soundwave.build(config), tmp_path / "model")
    folder = llm_folder(artifact.load(tmp_path / "model"), tmp_path / "model", tmp_path / "out")
    assert folder == Path(bases[1])
