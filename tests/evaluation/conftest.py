"""Tiny random models and packed folders, made on the spot: sizes where every path runs within a second."""

import io

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from data_tools.shards import ShardWriter, write_index
from model import artifact
from model.config import EncoderConfig, LLMConfig, SoundwaveConfig
from model.soundwave import Soundwave

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SECONDS = [0.4, 1.3, 0.7, 2.1, 0.5, 1.0, 0.9]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a tiny Whisper and a tiny Llama with a byte tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=300,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=80,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    ).save_pretrained(root / "whisper")
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.3,
        )
    ).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    return root


def config_of(parts) -> SoundwaveConfig:
    return SoundwaveConfig(
        encoder=EncoderConfig(name=str(parts / "whisper")),
        llm=LLMConfig(name=str(parts / "llm"), lora_r=4),
        attention_implementation="sdpa",
    )


def scatter(model: Soundwave) -> None:
    """Random values for what starts at zero, so that adapters and LoRA show in the answers."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith("shrinking.out"):
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="session")
def folders(parts, tmp_path_factory):
    """Model folders of stage 1 and stage 2."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(2)
    first = Soundwave.build(config_of(parts), parts=("encoder", "adapters"))
    artifact.save(first, root / "alignment")
    second = Soundwave.build(config_of(parts))
    second.set_stage("shrinking")
    scatter(second)
    artifact.save(second, root / "shrinking")
    return root


def sound(seconds: float, seed: int) -> bytes:
    """A chirp in noise as FLAC at 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * (150 + 40 * seed + 300 * time) * time) + 0.05 * random.standard_normal(
        len(time)
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), 16000, format="FLAC")
    return buffer.getvalue()


def write_folder(path, samples):
    """samples: (record, audio bytes or None) -> a packed folder of one shard."""
    path.mkdir(parents=True)
    writer = ShardWriter(path / "part-000000.tar")
    for number, (record, audio) in enumerate(samples):
        writer.add(f"{number:06d}", audio, "flac", record)
    write_index(path, path.name, [writer.close("part-000000.tar")])
    return path


def record(number: int, seconds: float | None, task: str = "asr", **more) -> dict:
    return {
        "id": f"{task}-{number}",
        "corpus": "toy",
        "task": task,
        "text": f"words of clip {number}",
        "lang": "en",
        "duration": seconds,
        "sample_rate": 16000,
    } | more


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Seven ASR clips, one broken clip, two translations and a text-only question."""
    samples = [(record(i, seconds), sound(seconds, i)) for i, seconds in enumerate(SECONDS)]
    samples.append((record(7, 0.8), sound(0.8, 7)[:60]))
    for i, seconds in ((8, 0.6), (9, 0.9)):
        samples.append(
            (
                record(
                    i, seconds, "translation", prompt="Translate the speech into French.", response="les mots"
                ),
                sound(seconds, i),
            )
        )
    samples.append(
        (record(10, None, "text", text=None, prompt="Say yes or no.", response="yes", label="yes"), None)
    )
    return write_folder(tmp_path_factory.mktemp("shards") / "toy", samples)
