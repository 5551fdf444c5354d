"""What others load: AutoModel, plain transformers, plain peft; and what the model card says."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model.auto  # noqa: F401  registers Soundwave with AutoModel
from evaluation.run import joint_search
from model import folder as model_folder
from model.export import main as export
from tests.model import tiny
from tests.model.conftest import build

CHAT = [{"role": "user", "content": "<audio_patch>\nWhat is said?"}]


@pytest.fixture
def run(folders, tmp_path):
    """A stage's folder as training leaves it, with packed data and scores beside it."""
    made = build(folders, "llama")
    shards = tmp_path / "dialogues-train"
    shards.mkdir()
    (shards / "index.json").write_text(json.dumps({"name": "dialogues", "hours": 2.345, "tasks": ["asr"], "langs": ["en"],
                                                   "shardlist": [{"nsamples": 30}, {"nsamples": 12}]}))
    recipe = {"stage": "shrinking", "data": {"train": [{"shards": str(shards)}], "ctc_text": "raw"},
              "optim": {"steps": 300, "lr_lora": 2e-4}}
    model_folder.save(made, tmp_path / "shrinking" / "model", {"step": 300, "recipe": recipe})
    (tmp_path / "shrinking" / "model" / "evaluation").mkdir()
    (tmp_path / "shrinking" / "model" / "evaluation" / "dialogues-test-asr.scores.json").write_text(json.dumps(
        {"tasks": {"asr": {"utterances": 99, "wer": 0.4321, "wer_ci95": [0.4, 0.5], "cer": 0.2}}}))
    return made, tmp_path / "shrinking"


def answers(speech_llm):
    return speech_llm.answer([CHAT, CHAT], [torch.linspace(-1, 1, 9000).sin(), torch.linspace(0, 300, 4000).sin()],
                             max_new_tokens=8)


@pytest.mark.parametrize("options", [[], ["--merge"], ["--merge", "--with-encoder"]])
@torch.no_grad()
def test_export_answers_as_the_run_does(run, folders, tmp_path, options):
    original, folder = run
    out = tmp_path / "export"
    assert export([str(folder), "--out", str(out), *options]) == 0
    loaded = AutoModel.from_pretrained(out)
    assert answers(loaded) == answers(original)
    batch = tiny.batch(original, [[*CHAT, {"role": "assistant", "content": "the wall"}]], [0.5], ["the wall"])
    for losses in (("ctc",), ("ce", "ctc")):
        torch.testing.assert_close(loaded(batch, losses=losses)[:2], original(batch, losses=losses)[:2], rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[5, 9, 3]])
    expected = original.llm(ids).logits
    if options:  # the LLM inside is a plain one
        assert not (out / "lora").exists()
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out / "llm")(ids).logits, expected, rtol=1e-4, atol=1e-4)
    else:
        base = AutoModelForCausalLM.from_pretrained(folders("llama"))
        torch.testing.assert_close(PeftModel.from_pretrained(base, out / "lora")(ids).logits, expected)
    assert (out / "encoder").exists() == ("--with-encoder" in options)
    words = AutoTokenizer.from_pretrained(out)
    assert words.convert_tokens_to_ids("<audio_patch>") == original.audio_id and words.chat_template
    assert words.convert_tokens_to_ids("<|eot_id|>") in GenerationConfig.from_pretrained(out).eos_token_id
    assert json.loads((out / "config.json").read_text())["model_type"] == "soundwave"
    asked = argparse.Namespace(model=out, ctc_weight=1.0, beams=2, token_bonus=0.0)
    assert joint_search(asked).ctc_text == "raw", "the text that its CTC was taught"


def test_model_card_is_filled_in(run, tmp_path):
    original, folder = run
    assert export([str(folder / "model"), "--out", str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == [original.config.llm.name, original.config.encoder.name] and header["language"] == ["en"]
    for said in ("2.35 hours", "| dialogues | 42 | 2.35 | asr | en |", "300 steps", "lr_lora: 0.0002",
                 *original.frozen_hash().values(), "| dialogues-test-asr | asr | 99 | wer 0.432 (0.400 to 0.500), cer 0.200 |"):
        assert said in card, said


def test_what_cannot_be_exported_is_one_line(run, folders, tmp_path, capsys):
    _, folder = run
    model_folder.save(build(folders, parts=("encoder", "adapters")), tmp_path / "one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (([tmp_path / "one"], "stage I folder"), ([tmp_path / "full"], "soundwave.json is missing"),
                               ([folder], "is not empty")):
        assert export([str(arguments[0]), "--out", str(tmp_path / "full")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
