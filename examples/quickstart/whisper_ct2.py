"""A Whisper model in CTranslate2's `model.bin` to a transformers folder. Changes when either of the two
formats does.

The layout of `model.bin` (CTranslate2, models/model.cc), little-endian:

    u32 version | string model name | u32 revision
    u32 count   | per variable: string name, u8 rank, u32 x rank shape, u8 dtype, u32 bytes, data
    u32 count   | per alias: string name, string target
    string: u16 length counting a closing NUL, then the bytes;  dtype: see DTYPES

Attention's projections are stacked along the rows: `self_attention/linear_0` holds q, k, v;
`attention/linear_1` (cross) holds k, v; the last `linear_*` is the output projection. Whisper's k projection
has no bias; CTranslate2 stores zeros for it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}


class _Cursor:
    """Reads the primitive fields of `model.bin` one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def raw(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise ValueError(
                f"model.bin ends at byte {len(self.data)}, {self.at + length} expected: is a part missing?"
            )
        self.at += length
        return self.data[self.at - length : self.at]

    def string(self) -> str:
        return self.raw(self.number("H")).rstrip(b"\0").decode()


def read_variables(data: bytes) -> dict[str, np.ndarray]:
    """All variables of a `model.bin`, aliases resolved. Errors: ValueError where the file ends early."""
    cursor = _Cursor(data)
    cursor.number("I"), cursor.string(), cursor.number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(cursor.number("I")):
        name = cursor.string()
        shape = [cursor.number("I") for _ in range(cursor.number("B"))]
        dtype = DTYPES[cursor.number("B")]
        variables[name] = np.frombuffer(cursor.raw(cursor.number("I")), dtype).reshape(shape)
    for _ in range(cursor.number("I")):
        alias, target = cursor.string(), cursor.string()
        variables[alias] = variables[target]
    return variables


def _linear(state: dict, target: str, weight: np.ndarray, bias: np.ndarray | None) -> None:
    state[f"{target}.weight"] = torch.from_numpy(weight.astype(np.float32))
    if bias is not None:
        state[f"{target}.bias"] = torch.from_numpy(bias.astype(np.float32))


def _stacked(state: dict, target: str, names: str, weight: np.ndarray, bias: np.ndarray) -> None:
    """Split rows into the projections `names` (letters of qkv); k has no bias in Whisper."""
    for name, w, b in zip(names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True):
        _linear(state, f"{target}.{name}_proj", w, None if name == "k" else b)


def state_dict_of(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2's variables under transformers' names (float32)."""
    v, state = variables, {}

    def copy(target: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        _linear(state, target, v[f"{source}/{weight}"], v[f"{source}/{bias}"])

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = torch.from_numpy(
            v[f"{side}/position_encodings/encodings"].astype(np.float32)
        )
        copy(f"model.{side}.layer_norm", f"{side}/layer_norm", "gamma", "beta")
        for i in range(layer_count(v, side)):
            target, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention = f"{source}/self_attention"
            _stacked(
                state,
                f"{target}.self_attn",
                "qkv",
                v[f"{attention}/linear_0/weight"],
                v[f"{attention}/linear_0/bias"],
            )
            copy(f"{target}.self_attn.out_proj", f"{attention}/linear_1")
            copy(f"{target}.self_attn_layer_norm", f"{attention}/layer_norm", "gamma", "beta")
            if side == "decoder":
                cross = f"{source}/attention"
                copy(f"{target}.encoder_attn.q_proj", f"{cross}/linear_0")
                _stacked(
                    state,
                    f"{target}.encoder_attn",
                    "kv",
                    v[f"{cross}/linear_1/weight"],
                    v[f"{cross}/linear_1/bias"],
                )
                copy(f"{target}.encoder_attn.out_proj", f"{cross}/linear_2")
                copy(f"{target}.encoder_attn_layer_norm", f"{cross}/layer_norm", "gamma", "beta")
            copy(f"{target}.fc1", f"{source}/ffn/linear_0")
            copy(f"{target}.fc2", f"{source}/ffn/linear_1")
            copy(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm", "gamma", "beta")
    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    words = torch.from_numpy(v["decoder/embeddings/weight"].astype(np.float32))
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = words
    return state


def layer_count(variables: dict[str, np.ndarray], side: str) -> int:
    return sum(
        name.startswith(f"{side}/layer_") and name.endswith("/self_attention/linear_0/weight")
        for name in variables
    )


def convert(parts: list[Path], tokenizer: Path, settings: Path, out: Path) -> None:
    """Write a transformers folder: config, weights (float32), tokenizer, feature extractor, generation
    config.

    `parts`: the pieces of model.bin in order. `tokenizer`: the package's tokenizer.json. `settings`: its
    config.json, which holds the language ids and the suppressed tokens that multilingual decoding needs.
    """
    variables = read_variables(b"".join(part.read_bytes() for part in parts))
    width, mels, _ = variables["encoder/conv1/weight"].shape
    config = WhisperConfig(
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layer_count(variables, "encoder"),
        decoder_layers=layer_count(variables, "decoder"),
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,  # every Whisper size has heads of 64
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        dtype="float32",
        pad_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50257,
        decoder_start_token_id=50258,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state_dict_of(variables), strict=True)
    ct2 = json.loads(settings.read_text())
    tokens = {entry["content"]: entry["id"] for entry in json.loads(tokenizer.read_text())["added_tokens"]}
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        max_length=448,
        is_multilingual=True,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        prev_sot_token_id=tokens["<|startofprev|>"],
        task_to_id={task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")},
        lang_to_id={name: i for name, i in tokens.items() if i in set(ct2["lang_ids"])},
        suppress_tokens=[i for i in ct2["suppress_ids"] if i >= 0],
        begin_suppress_tokens=ct2["suppress_ids_begin"],
        alignment_heads=ct2["alignment_heads"],
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(out)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    special = {
        "tokenizer_class": "WhisperTokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 448,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
