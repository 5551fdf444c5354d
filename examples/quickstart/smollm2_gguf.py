"""SmolLM2-135M-Instruct in a GGUF file to a transformers folder. Changes when transformers' GGUF reader does.

The file holds 4-bit weights; they are dequantised to float32 as llama.cpp would, so the model is a little
weaker than the original in half precision. A model read from GGUF refuses `save_pretrained` (it counts as
quantised): its weights are moved into a plain LlamaForCausalLM first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM


def convert(gguf: Path, out: Path) -> None:
    """Write a transformers folder with config, weights (float32, tied embeddings), tokenizer and chat
    template."""
    read = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "transformers_version")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict(), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
