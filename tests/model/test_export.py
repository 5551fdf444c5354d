"""What others load: AutoModel, plain transformers, plain peft; and what the model card says."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model.auto  # noqa: F401  registers Soundwave with AutoModel
from evaluation.run import joint_search
from model import artifact
from model.export import main as export
from model.generation.greedy import SoundWarning
from model.waveforms import mono
from tests.model import tiny
from tests.model.conftest import build

CHAT = [{"role": "user", "content": "<audio_patch>\nWhat is said?"}]


@pytest.fixture
def run(folders, tmp_path):
    """A stage's folder as training leaves it, with packed data and scores beside it."""
    made = build(folders, "llama")
    shards = tmp_path / "dialogues-train"
    shards.mkdir()
    (shards / "index.json").write_text(
        json.dumps(
            {
                "name": "dialogues",
                "hours": 2.345,
                "tasks": ["asr"],
                "langs": ["en"],
                "shardlist": [{"nsamples": 30}, {"nsamples": 12}],
            }
        )
    )
    recipe = {
        "stage": "shrinking",
        "data": {"train": [{"shards": str(shards)}], "ctc_text": "raw", "max_seconds": 12.5},
        "optim": {"steps": 300, "lr_lora": 2e-4},
    }
    artifact.save(made, tmp_path / "shrinking" / "model", {"step": 300, "recipe": recipe})
    (tmp_path / "shrinking" / "model" / "evaluation").mkdir()
    (tmp_path / "shrinking" / "model" / "evaluation" / "dialogues-test-asr.scores.json").write_text(
        json.dumps({"tasks": {"asr": {"utterances": 99, "wer": 0.4321, "wer_ci95": [0.4, 0.5], "cer": 0.2}}})
    )
    return made, tmp_path / "shrinking"


def answers(speech_llm):
    return speech_llm.answer(
        [CHAT, CHAT],
        [torch.linspace(-1, 1, 9000).sin(), torch.linspace(0, 300, 4000).sin()],
        max_new_tokens=8,
    )


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
        torch.testing.assert_close(
            loaded(batch, losses=losses)[:2], original(batch, losses=losses)[:2], rtol=1e-4, atol=1e-4
        )
    ids = torch.tensor([[5, 9, 3]])
    expected = original.llm(ids).logits
    if options:  # the LLM inside is a plain one
        assert not (out / "lora").exists()
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(out / "llm")(ids).logits, expected, rtol=1e-4, atol=1e-4
        )
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
    assert loaded.trained_seconds == 12.5, "the longest clip of its training"


def test_model_card_is_filled_in(run, tmp_path):
    original, folder = run
    assert export([str(folder / "model"), "--out", str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["language"] == ["en"] and "base_model" not in header  # folders are no ids of the hub
    for said in (
        "2.35 hours",
        "| dialogues | 42 | 2.35 | asr | en |",
        "300 steps",
        "lr_lora: 0.0002",
        *original.frozen_hash().values(),
        "| dialogues-test-asr | asr | 99 | wer 0.432 (0.400 to 0.500), cer 0.200 |",
    ):
        assert said in card, said


def test_what_cannot_be_exported_is_one_line(run, folders, tmp_path, capsys):
    _, folder = run
    artifact.save(build(folders, parts=("encoder", "adapters")), tmp_path / "one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ([tmp_path / "one"], "stage 1 folder"),
        ([tmp_path / "full"], "soundwave.json is missing"),
        ([folder], "is not empty"),
    ):
        assert export([str(arguments[0]), "--out", str(tmp_path / "full")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error


@torch.no_grad()
def test_run_export_and_merged_export_answer_alike(folders, tmp_path):
    """Whatever the base's generation settings hold: the second end of turn (Llama 3.1 has three, Qwen two)
    and all that is not taken."""
    base = tmp_path / "llm"
    first = build(folders, "llama")
    shutil.copytree(folders("llama"), base)
    free = answer_ids(first)
    settings = json.loads((base / "generation_config.json").read_text())
    for name, more in (
        ("ends", {"eos_token_id": [settings["eos_token_id"], free[0][4]]}),
        ("others", {"no_repeat_ngram_size": 2, "top_k": 2}),
    ):
        (base / "generation_config.json").write_text(json.dumps(settings | more))
        run = build(
            lambda part, **options: folders(part, **options) if part == "whisper" else str(base), "llama"
        )
        artifact.save(run, tmp_path / name / "model", {"step": 1})
        found = {"run": answer_ids(run)}
        for kind, options in (("folder", None), ("export", []), ("merged", ["--merge"])):
            out = tmp_path / name / ("model" if options is None else kind)
            if options is not None:
                assert export([str(tmp_path / name), "--out", str(out), *options]) == 0
                ends = GenerationConfig.from_pretrained(out).eos_token_id
                assert set(ends) >= set(more.get("eos_token_id", [settings["eos_token_id"]]))
                assert not GenerationConfig.from_pretrained(out).no_repeat_ngram_size
            loaded = artifact.load(out)
            found[kind] = answer_ids(loaded)
            for seed in (0, 1):
                sampled = [answer_ids(m, seed, do_sample=True, temperature=1.0) for m in (run, loaded)]
                assert sampled[0] == sampled[1]
        assert all(ids == found["run"] for ids in found.values()), found
        assert (found["run"] == free) == (name == "others")


def answer_ids(speech_llm, seed: int = 0, **options) -> list[list[int]]:
    torch.manual_seed(seed)
    clips = [mono(torch.linspace(-1, 1, 9000).sin())[0], mono(torch.linspace(0, 300, 4000).sin())[0]]
    return speech_llm.generate(speech_llm.prompts([CHAT, CHAT], clips), max_new_tokens=8, **options)


def test_automodel_follows_or_refuses_every_option(run, tmp_path):
    _, folder = run
    out = tmp_path / "export"
    assert export([str(folder), "--out", str(out), "--merge", "--with-encoder"]) == 0

    def loaded(**options):
        found = AutoModel.from_pretrained(out, **options)
        weight = next(found.llm.parameters())
        return (
            str(weight.dtype).removeprefix("torch."),
            str(weight.device),
            found.llm.config._attn_implementation,
        )

    plain = loaded()
    assert plain == ("float32", "cpu", "sdpa")
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        assert loaded(**options)[0] == "bfloat16"
    for options in (
        {"device_map": "cpu"},
        {"device_map": {"": torch.device("cpu")}},
        {"device": "cpu", "dtype": "auto"},
    ):
        assert loaded(**options) == plain
    assert loaded(attn_implementation="eager")[2] == "eager"
    harmless = {
        "trust_remote_code": True,
        "low_cpu_mem_usage": True,
        "local_files_only": True,
        "load_in_8bit": False,
        "quantization_config": None,
        "revision": "main",
        "cache_dir": str(tmp_path),
        "use_safetensors": True,
    }
    assert loaded(**harmless) == plain
    for options, error, message in (
        ({"load_in_8bit": True}, ValueError, "load_in_8bit=True"),
        ({"quantization_config": {"load_in_4bit": True}}, ValueError, "quantization_config"),
        ({"revision": "v2"}, ValueError, "revision='v2'"),
        ({"dtpye": "bfloat16"}, TypeError, "'dtpye'; did you mean 'dtype'"),
        ({"verfy": False}, TypeError, "did you mean 'verify'"),
        ({"max_memory": {0: "1GB"}}, TypeError, "unknown option 'max_memory'"),
        ({"device_map": {"a": 0, "b": 1}}, ValueError, "on one device"),
        ({"device_map": "balanced"}, ValueError, "on one device"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, ValueError, "dtype and torch_dtype"),
        ({"dtype": "int8"}, ValueError, "model.dtype is 'int8'"),
        ({"device": "cpu", "device_map": "cpu"}, ValueError, "two names"),
    ):
        with pytest.raises(error, match=message):
            loaded(**options)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_is_as_readable_as_the_umask_says(run, tmp_path, umask):
    original, folder = run
    before = os.umask(umask)
    try:
        artifact.save(original, tmp_path / "saved")
        (folder / "model" / "lora" / "adapter_model.safetensors").chmod(0o600)  # of a folder from before
        assert export([str(folder), "--out", str(tmp_path / "plain")]) == 0
        assert export([str(folder), "--out", str(tmp_path / "full"), "--merge", "--with-encoder"]) == 0
    finally:
        os.umask(before)
    files = [
        path for name in ("saved", "plain", "full") for path in (tmp_path / name).rglob("*") if path.is_file()
    ]
    modes = {str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert len(modes) > 10 and set(modes.values()) == {oct(0o666 & ~umask)}, modes


def test_long_audio_is_said_where_the_folder_knows_what_it_was_trained_on(run):
    _, folder = run
    loaded = artifact.load(folder / "model")
    with pytest.warns(SoundWarning, match="lasts 13.0 s, the model was trained on clips of at most 12.5 s"):
        loaded.prompts([CHAT], [torch.zeros(13 * 16000)])
