"""Stages 2 and 3 once more as a plain PyTorch loop: one utterance at a time, every logit there, one
process.

Nothing of the project is imported. Files are read as any user could read them (tar, JSON, FLAC, safetensors).
The maths is that of docs/method.md: transformers' own Whisper and LLM, F.ctc_loss, F.cross_entropy, and the
adapters, AdamW, its schedule and the clipping written out.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

AUDIO = "<audio_patch>"


def read_corpus(folder: Path) -> dict[str, tuple[dict, torch.Tensor | None]]:
    """{id: (JSON, waveform [S] at 16 kHz, or None)} of a packed folder."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                parts.setdefault(key, {})[kind] = tar.extractfile(member).read()
        for files in parts.values():
            meta = json.loads(files["json"])
            wave = (
                torch.from_numpy(soundfile.read(io.BytesIO(files["flac"]), dtype="float32")[0])
                if "flac" in files
                else None
            )
            found[meta["id"]] = meta, wave
    return found


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


class Network(nn.Module):
    """The network of a model folder of stage 2 or 3: tied CTC head, look-back over all frames, peaks
    kept."""

    def __init__(self, folder: Path, whisper: str, llm: str):
        super().__init__()
        settings = json.loads((folder / "soundwave.json").read_text())["config"]
        self.whisper = WhisperModel.from_pretrained(whisper).encoder.eval().requires_grad_(False)
        self.mel = WhisperFeatureExtractor(feature_size=self.whisper.config.num_mel_bins)
        self.llm = AutoModelForCausalLM.from_pretrained(llm).eval().requires_grad_(False)
        self.words = AutoTokenizer.from_pretrained(llm)
        self.words.add_special_tokens({"additional_special_tokens": [AUDIO]})
        self.audio_id = self.words.convert_tokens_to_ids(AUDIO)
        self.stack = settings["alignment"]["stack_frames"]
        self.heads = self.llm.config.num_attention_heads
        weights = load_file(folder / "adapters.safetensors")
        for name, value in weights.items():
            self.register_parameter(name.replace(".", "__"), nn.Parameter(value))
        if not (folder / "lora").is_dir():
            return
        lora = load_file(folder / "lora" / "adapter_model.safetensors")
        peft = json.loads((folder / "lora" / "adapter_config.json").read_text())
        for name in sorted(n.removesuffix(".lora_A.weight") for n in lora if n.endswith(".lora_A.weight")):
            place = name.removeprefix("base_model.model.")
            parent, _, last = place.rpartition(".")
            owner = self.llm.get_submodule(parent)
            setattr(
                owner,
                last,
                LoraLinear(
                    getattr(owner, last),
                    lora[f"{name}.lora_A.weight"],
                    lora[f"{name}.lora_B.weight"],
                    peft["lora_alpha"] / peft["r"],
                ),
            )

    def own(self, name: str) -> nn.Parameter:
        return getattr(self, name.replace(".", "__"))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.own(f"{name}.weight"), self.own(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.own(f"{name}.weight"), self.own(f"{name}.bias"))

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[K, D], [T, D], [T, D] -> [K, D], the softmax written out."""
        query, key, value = (x.view(len(x), self.heads, -1).transpose(0, 1) for x in (query, key, value))
        return (
            ((query @ key.transpose(1, 2)) / query.shape[-1] ** 0.5)
            .softmax(-1)
            .matmul(value)
            .transpose(0, 1)
            .flatten(1)
        )

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Whisper at the clip's true length: its first frames of the mel of 30 s; zeros stand beyond the
        clip."""
        frames = math.ceil(len(wave) / 160)
        x = self.mel(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features[:, :, :frames]
        x = F.gelu(self.whisper.conv2(F.gelu(self.whisper.conv1(x)))).transpose(1, 2)
        x = x + self.whisper.embed_positions.weight[: x.shape[1]]
        for layer in self.whisper.layers:
            x = layer(x, None)
        return self.whisper.layer_norm(x)[0]

    def align(self, features: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [ceil(T / stack), D]: nn.TransformerEncoderLayer(norm_first=True) without dropout."""
        features = F.pad(features, (0, 0, 0, -len(features) % self.stack))
        x = self.linear(features.view(len(features) // self.stack, -1), "alignment.projection")
        query, key, value = self.linear(
            self.norm(x, "alignment.layers.0.norm1"), "alignment.layers.0.qkv"
        ).chunk(3, dim=-1)
        x = x + self.linear(self.attention(query, key, value), "alignment.layers.0.out")
        inner = F.relu(self.linear(self.norm(x, "alignment.layers.0.norm2"), "alignment.layers.0.up"))
        return self.norm(x + self.linear(inner, "alignment.layers.0.down"), "alignment.norm")

    def shrink(self, hidden: torch.Tensor, log: torch.Tensor, blank: int) -> torch.Tensor:
        best = log.argmax(-1).tolist()
        runs: list[list[int]] = []
        for t, token in enumerate(best):
            if t and token == best[t - 1]:
                runs[-1].append(t)
            else:
                runs.append([t])
        peaks = [max(run, key=lambda t: float(log[t].max())) for run in runs if best[run[0]] != blank]
        kept = hidden[peaks or [int(log[:, blank].argmin())]]
        key, value = self.linear(hidden, "shrinking.key_value").chunk(2, dim=-1)
        looked = self.linear(
            self.attention(self.linear(kept, "shrinking.query"), key, value), "shrinking.out"
        )
        return self.norm(kept + looked, "shrinking.norm")

    def losses(self, meta: dict, wave: torch.Tensor | None) -> tuple[torch.Tensor, int, torch.Tensor, int]:
        """(sum of cross-entropy, target tokens, CTC / target length, 1 or 0) of one utterance."""
        hidden, log, table = None, None, self.llm.get_output_embeddings().weight
        blank, ctc, transcripts = len(table), torch.zeros(()), 0
        if wave is not None:
            hidden = self.align(self.encode(wave))
            log = (hidden @ torch.cat([table, self.own("ctc_head.blank_row")[None]]).T).log_softmax(-1)
            if meta["text"]:
                target = torch.tensor(self.words.encode(" " + meta["text"].lower(), add_special_tokens=False))
                ctc = F.ctc_loss(
                    log,
                    target,
                    torch.tensor(len(log)),
                    torch.tensor(len(target)),
                    blank=blank,
                    reduction="sum",
                    zero_infinity=True,
                ) / len(target)
                transcripts = 1
        asked = (f"{AUDIO}\n" if wave is not None else "") + meta["prompt"]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": meta.get("response") or meta["text"]},
        ]
        before = self.words.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        after = self.words.apply_chat_template(messages, tokenize=False)[len(before) :]
        answer = after.rstrip("\n")  # the line break is the template's
        before, answer, after = (
            self.words.encode(text, add_special_tokens=False)
            for text in (before, answer, after[len(answer) :])
        )
        ids, labels = (
            torch.tensor(before + answer + after),
            torch.tensor([-100] * len(before) + answer + [-100] * len(after)),
        )
        table = self.llm.get_input_embeddings()
        if wave is not None:
            (at,) = (ids == self.audio_id).nonzero()[:, 0].tolist()
            shrunk = self.shrink(hidden, log.detach(), blank)
            row = torch.cat([table(ids[:at]), shrunk, table(ids[at + 1 :])])
            labels = torch.cat([labels[:at], torch.full((len(shrunk),), -100), labels[at + 1 :]])
        else:
            row = table(ids)
        logits = self.llm(inputs_embeds=row[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1], labels[1:], reduction="sum"), len(answer), ctc, transcripts


def learning_rate(peak: float, step: int, *, steps: int, warmup: int, least: float) -> float:
    """Linear warm-up, then a cosine down to `least` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (least + (1 - least) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def train(
    network: Network,
    corpus: dict,
    batches: list[list[str]],
    *,
    stage: int,
    ctc_weight: float,
    rates: dict[str, float],
    betas: tuple[float, float],
    eps: float,
    decay: float,
    warmup: int,
    least: float,
    clip: float,
    encoder: str | None = None,
    llm: bool = False,
    lora: bool = True,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train in place on batches of ids; returns each step's loss. rates: peaks of "adapters", "ctc_head",
    "lora", "encoder" and "llm". encoder: the start of the names of Whisper's weights that are trained. llm:
    whether all of the LLM's are, but its tables; lora: whether LoRA is."""
    trained = {}
    tables = {id(m.weight) for m in (network.llm.get_input_embeddings(), network.llm.get_output_embeddings())}
    for name, parameter in network.named_parameters():
        if name.startswith("whisper."):
            learns = encoder is not None and name.startswith(f"whisper.{encoder}")
            part = "encoder" if learns and "embed_positions" not in name else None  # constants
        elif name.startswith("llm."):
            part = "llm" if llm and id(parameter) not in tables else None
            if name.endswith((".a", ".b")):
                part = "lora" if lora else None
        else:
            part = "ctc_head" if name.startswith("ctc_head") else "adapters"
        own = part in ("adapters", "ctc_head")
        parameter.requires_grad_(part is not None and (stage == 2 or not own))
        if parameter.requires_grad:
            trained[name] = parameter, rates[part]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, (p, _) in trained.items()}
    found = []
    for step, ids in enumerate(batches):
        results = [network.losses(*corpus[name]) for name in ids]
        loss = sum(r[0] for r in results) / sum(r[1] for r in results)
        if stage == 2:
            loss = loss + ctc_weight * sum(r[2] for r in results) / sum(r[3] for r in results)
        gradients = dict(
            zip(trained, torch.autograd.grad(loss, [p for p, _ in trained.values()]), strict=True)
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        with torch.no_grad():
            for name, (parameter, peak) in trained.items():
                gradient = gradients[name] * min(1.0, clip / (norm + 1e-6))
                rate = learning_rate(peak, step, steps=len(batches), warmup=warmup, least=least)
                first, second = moments[name]
                first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
                second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
                if parameter.dim() > 1:
                    parameter.mul_(1 - rate * decay)
                denominator = (second / (1 - betas[1] ** (step + 1))).sqrt() + eps
                parameter.sub_(rate * first / (1 - betas[0] ** (step + 1)) / denominator)
        found.append(float(loss.detach()))
        after_step(step)
    return found
