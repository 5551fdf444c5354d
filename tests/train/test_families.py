"""Every family of LLMs and encoders that docs/reference/families.md names, at tiny size, the whole way: two ranks under
ZeRO-3 train two steps, stop, resume, end as the undisturbed run does; the model answers, is exported, and the
export answers alike.

    FAMILIES_OUT=benchmarks/results/families.json python -m pytest -m "slow or long" tests/train/test_families.py

writes what passed and what was refused, from which `python -m docs.generate` makes the table.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    HubertConfig,
    HubertModel,
    Llama4Config,
    Mistral3Config,
    ParakeetEncoder,
    ParakeetForCTC,
    PretrainedConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMModel,
)

import model.auto  # noqa: F401  registers Soundwave with AutoModel
from benchmarks.machine import machine
from model import artifact
from model.config import EncoderConfig, LLMConfig
from model.encoder import build_encoder
from model.export import main as export
from model.language_model import build_llm
from model.pretrained import SourceError, locate
from model.rows import probe
from tests.model import families, tiny
from tests.train.tiny import losses, weights, workspace

TORCH_SEED = 11


@dataclass(frozen=True)
class LLM:
    model_type: str
    style: str = "chatml"
    options: dict = field(default_factory=dict)
    wrapper: type | None = None  # configuration of the checkpoint that holds a vision tower, too


VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    vision_output_dim=16,
    projector_input_dim=16,
    projector_output_dim=16,
)
LLMS = {
    "Llama 3": LLM("llama", "llama3", dict(tie_word_embeddings=False)),
    "Llama 4, text": LLM("llama4_text", "llama3"),
    "Qwen 2.5": LLM("qwen2"),
    "Qwen 3": LLM("qwen3"),
    "Qwen 3 MoE": LLM("qwen3_moe"),
    "Gemma 2": LLM("gemma2", "gemma"),
    "Gemma 3, text": LLM("gemma3_text", "gemma"),
    "Phi 3, Phi 4": LLM("phi3"),
    "Mistral": LLM("mistral"),
    "SmolLM 2": LLM("llama", options=dict(tie_word_embeddings=True)),
    "SmolLM 3": LLM("smollm3"),
    "GLM-4": LLM("glm4"),
    "gpt-oss": LLM("gpt_oss"),
    "LFM2": LLM("lfm2"),
    "Gemma 3 with vision tower": LLM("gemma3_text", "gemma", wrapper=Gemma3Config),
    "Llama 4 with vision tower": LLM("llama4_text", "llama3", wrapper=Llama4Config),
}


def write_llm(folder: Path, name: str) -> None:
    """A random two-layer LLM of a family, with a byte-level tokenizer and its kind of chat template."""
    family = LLMS[name]
    words = tiny.tokenizer(family.style)
    ends = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=None)
    sizes = dict(vocab_size=len(words), **ends, **family.options)
    if family.wrapper:
        text = families.config(family.model_type, **sizes).to_dict()
        network = AutoModelForCausalLM.from_config(family.wrapper(text_config=text, vision_config=VISION))
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
    else:
        network = families.llm(family.model_type, seed=TORCH_SEED, **sizes)
    network.generation_config = GenerationConfig(**ends)
    network.save_pretrained(folder)
    words.save_pretrained(folder)


def speech(config_class: type, whole: type, **options) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        whole(config_class(**tiny.SPEECH_SIZES, **options)).save_pretrained(folder)

    return write


#: Family -> (what writes a random one, overrides of the recipe). Sizes of Whisper: model/presets/.
ENCODERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "Whisper tiny to large-v2, distil": (lambda folder: tiny.whisper(folder, mels=80), []),
    "Whisper large-v3, turbo": (lambda folder: tiny.whisper(folder, mels=128), []),
    "wav2vec 2.0": (
        speech(Wav2Vec2Config, Wav2Vec2ForCTC, vocab_size=9, num_codevectors_per_group=4),
        [],
    ),
    "HuBERT": (
        speech(HubertConfig, HubertModel, feat_extract_norm="layer", do_stable_layer_norm=True),
        [],
    ),
    "WavLM": (speech(WavLMConfig, WavLMModel), ["deepspeed=ds_configs/zero2.json"]),
    "w2v-BERT 2.0": (
        lambda folder: tiny.conformer(folder, Wav2Vec2BertModel, position_embeddings_type="relative_key"),
        [],
    ),
    "Parakeet (FastConformer), CTC": (
        lambda folder: tiny.conformer(folder, ParakeetForCTC),
        ["model.alignment.stack_frames=1"],
    ),
    "Parakeet (FastConformer), encoder": (
        lambda folder: tiny.conformer(folder, ParakeetEncoder),
        ["model.alignment.stack_frames=1"],
    ),
}
#: Those that continuous integration runs, each on one rank.
SHORT = ("gpt-oss", "w2v-BERT 2.0", "Parakeet (FastConformer), CTC")
QUIET = [
    "init_from=fresh",
    "log.tensorboard=false",
    "log.validate_at_start=false",
    "data.workers=0",
    "data.valid=[]",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return workspace(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def keep():
    """Put a row of the table into the file that FAMILIES_OUT names, in the place of the family's last one."""
    out = os.environ.get("FAMILIES_OUT")
    packages = ("transformers", "torch", "deepspeed", "peft", "tokenizers")
    made = machine()
    now = {"commit": made["commit"], "versions": {name: version(name) for name in packages}}

    def add(row: dict) -> None:
        if out:
            path = Path(out)
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            rows = [old for old in rows if old["family"] != row["family"]] + [{**row, **now}]
            order = [*LLMS, *ENCODERS, *REFUSED]
            rows = sorted((r for r in rows if r["family"] in order), key=lambda r: order.index(r["family"]))
            content = {"machine": made, "rows": rows}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    return add


def choice(place: Path, name: str) -> list[str]:
    """Overrides that put a family's tiny model in the place of the recipe's."""
    folder = place / re.sub(r"\W+", "-", name)
    torch.manual_seed(TORCH_SEED)
    more: list[str] = []
    if name in LLMS:
        write_llm(folder, name)
        part = "llm"
    else:
        write, more = ENCODERS[name]
        write(folder)
        part = "encoder"
    return [f"model.{part}.name={folder}", *more]


def whole_way(place: Path, server, name: str, ranks: int) -> dict:
    """Train, stop, resume, generate, export; errors are failures. Returns the table's row."""
    options = [place / "stage2.yaml", *choice(place, name), *QUIET, "optim.steps=3"]
    ends = {}
    for run_name, fault in (("stopped", ["signal_after", 1, "SIGTERM", 0]), ("undisturbed", None)):
        output = place / "runs" / re.sub(r"\W+", "-", name) / run_name
        run = server.start([*options, f"output={output}"], ranks=ranks, fault=fault)
        assert run.wait() == [85 if fault else 0] * ranks, run.text()
        if fault:
            assert sorted(losses(output / "shrinking")) == [0, 1]
            run = server.start([*options, f"output={output}"], ranks=ranks)
            assert run.wait() == [0] * ranks and "resuming at step 2" in run.text(), run.text()
        ends[run_name] = losses(output / "shrinking"), weights(output / "shrinking"), run.text()
        if ranks == 1:
            break
    steps, tensors, text = ends["stopped"]
    assert sorted(steps) == [0, 1, 2] and all(torch.tensor(list(steps.values())).isfinite())
    if "undisturbed" in ends:
        assert steps == ends["undisturbed"][0]
        assert all(torch.equal(tensors[key], value) for key, value in ends["undisturbed"][1].items())
    check_model(place / "runs" / re.sub(r"\W+", "-", name) / "stopped" / "shrinking" / "model")
    joined = re.search(r"(joined|padded)", "".join(line for line in text.splitlines() if "rows" in line))
    return {
        "kind": "LLM" if name in LLMS else "encoder",
        "family": name,
        "zero": 2 if any("zero2" in str(option) for option in options) else 3,
        "ranks": ranks,
        "rows": joined[1] if joined else None,
        "passed": ["train", "resume", "generate", "export"],
    }


def check_model(folder: Path) -> None:
    """A trained model's answers, alone and in a batch, and its export's, with LoRA merged by transformers."""
    trained = artifact.load(folder).eval()
    chat = [{"role": "user", "content": "<audio_patch>\nWhat is said?"}]
    clips = [torch.linspace(-1, 1, 9000).sin(), torch.linspace(0, 300, 14_000).sin()]
    answers = [trained.answer([chat], [clip], max_new_tokens=6)[0] for clip in clips]
    assert trained.answer([chat, chat], clips, max_new_tokens=6) == answers
    out = folder.parent / "export"
    assert export([str(folder), "--out", str(out), "--merge", "--with-encoder"]) == 0
    assert AutoModel.from_pretrained(out).answer([chat, chat], clips, max_new_tokens=6) == answers
    ids = AutoTokenizer.from_pretrained(out)("two and two", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out / "llm").eval()(ids).logits
        torch.testing.assert_close(merged.float(), trained.llm(ids).logits.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow  # two starts of a real rank for each
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) for name in SHORT[:-1]] + [SHORT[-1]]
)
def test_short_way(place, server, name):
    whole_way(place, server, name, 1)


@pytest.mark.long  # three starts of two ranks for each family; FAMILIES_RANKS=1: two starts of one
@pytest.mark.parametrize("name", [*LLMS, *ENCODERS])
def test_whole_way(place, server, keep, name):
    keep(whole_way(place, server, name, int(os.environ.get("FAMILIES_RANKS", "2"))))


def plain(config: PretrainedConfig, **more) -> Callable[[Path], object]:
    """A folder with a configuration only: it is refused before weights are read."""

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        given = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**given, **more}))

    return write


#: Family -> (part, what writes it, the error).
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "gpt-oss as published (MXFP4)": (
        "LLM",
        plain(families.config("gpt_oss"), quantization_config={"quant_method": "mxfp4"}),
        r"is quantised \(mxfp4\)",
    ),
    "Mistral Small 3.1 and later (with vision tower)": (
        "LLM",
        plain(Mistral3Config()),
        "'mistral3' model is no LLM that transformers' AutoModelForCausalLM loads",
    ),
    "Gemma 4, text": (
        "LLM",
        lambda folder: families.llm("gemma4_text").save_pretrained(folder),
        "does not run as the LLM, which is given embeddings in place of token ids",
    ),
    "T5 (encoder and decoder)": (
        "LLM",
        plain(AutoConfig.for_model("t5")),
        "'t5' model is no LLM that transformers' AutoModelForCausalLM loads",
    ),
    "Moonshine": ("encoder", plain(AutoConfig.for_model("moonshine")), "encoders known: whisper"),
    "SeamlessM4T": ("encoder", plain(AutoConfig.for_model("seamless_m4t_v2")), "encoders known: whisper"),
    "wav2vec2-Conformer": (
        "encoder",
        plain(AutoConfig.for_model("wav2vec2-conformer")),
        "encoders known: whisper",
    ),
    "wav2vec 2.0 with add_adapter": (
        "encoder",
        plain(Wav2Vec2Config(add_adapter=True)),
        "has an adapter that drops frames",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_family_that_cannot_be_used_is_refused_in_one_line(name, tmp_path, keep):
    part, write, words = REFUSED[name]
    write(tmp_path / "refused")
    with pytest.raises(SourceError, match=words) as caught:
        source = locate(str(tmp_path / "refused"))
        if part == "encoder":
            build_encoder(EncoderConfig(name=source.name), source, torch.float32, None)
        else:
            probe(build_llm(LLMConfig(name=source.name, lora_r=2), source, torch.float32, None), 5)
    message = str(caught.value)
    assert "\n" not in message
    keep({"kind": part, "family": name, "refused": message.replace(f"{tmp_path}/refused", "...")})
