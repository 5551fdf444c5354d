"""Small packed folders and a small tokenizer, made on the spot."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_tools.shards import SAMPLE_DTYPE, ShardIndex, ShardWriter, write_index
from model.config import SoundwaveConfig
from recipe.config import Corpus, DataConfig

logging.getLogger("transformers").setLevel(logging.ERROR)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, two marks, and the audio's placeholder."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<audio_patch>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model_config():
    return SoundwaveConfig()


def sound(seconds: float, seed: int = 0, rate: int = 16000, container: str = "flac") -> bytes:
    """A tone in noise as file bytes."""
    random = np.random.default_rng(seed)
    time = np.arange(int(round(seconds * rate))) / rate
    wave = 0.3 * np.sin(2 * np.pi * (150 + 30 * (seed % 20)) * time) + 0.02 * random.standard_normal(
        len(time)
    )
    buffer = io.BytesIO()
    subtype = "FLOAT" if container == "wav" else None
    soundfile.write(buffer, wave.astype(np.float32), rate, format=container.upper(), subtype=subtype)
    return buffer.getvalue()


def record(number: int, seconds: float | None, task: str = "asr", corpus: str = "toy", **more) -> dict:
    return {
        "id": f"{task}-{number}",
        "corpus": corpus,
        "task": task,
        "text": f"the words of clip {number}",
        "lang": "en",
        "duration": seconds,
        "sample_rate": 16000,
        **more,
    }


def write_folder(folder, samples, per_shard: int = 5, name: str = "toy"):
    """samples: (record, audio bytes or None, codec) -> a packed folder."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = []
    for first in range(0, len(samples), per_shard):
        file = f"{name}-{first // per_shard:06d}.tar"
        writer = ShardWriter(folder / file)
        for number, (entry, audio, codec) in enumerate(samples[first : first + per_shard]):
            writer.add(f"{first + number:09d}", audio, codec, entry)
        summaries.append(writer.close(file))
    write_index(folder, name, summaries)
    return folder


@pytest.fixture
def packed(tmp_path):
    """23 clips of 0.3 to 2.5 s in 5 shards."""
    samples = []
    for number in range(23):
        seconds = 0.3 + 0.1 * number
        samples.append((record(number, seconds), sound(seconds, number), "flac"))
    return write_folder(tmp_path / "toy", samples)


@pytest.fixture
def mixed(tmp_path):
    """ASR, translation and text-only turns in one folder, shuffled over its shards."""
    samples = []
    for number in range(30):
        seconds = 0.3 + 0.05 * number
        kind = number % 5
        if kind == 4:
            samples.append(
                (
                    record(number, None, "text", text=None, prompt="What is two and two?", response="Four."),
                    None,
                    "",
                )
            )
        elif kind == 3:
            samples.append(
                (
                    record(number, seconds, "translation", prompt="To French.", response="les mots"),
                    sound(seconds, number),
                    "flac",
                )
            )
        else:
            samples.append((record(number, seconds), sound(seconds, number), "flac"))
    return write_folder(tmp_path / "mixed", samples)


def data_config(*folders, **settings) -> DataConfig:
    settings = {"batch_seconds": 8.0, "micro_batch_seconds": 4.0, "workers": 0, "prefetch": 2, **settings}
    return DataConfig(train=[Corpus(shards=str(folder)) for folder in folders], **settings)


def table_index(
    durations, shard_sizes, folder="nowhere", tasks=("asr",), task_of=None, characters=20
) -> ShardIndex:
    """A ShardIndex without shards: what the plan reads of 10,000 utterances, and no audio."""
    from pathlib import Path

    samples = np.zeros(len(durations), SAMPLE_DTYPE)
    samples["shard"] = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    samples["duration"], samples["audio_size"], samples["characters"] = durations, 1000, characters
    samples["task"] = 0 if task_of is None else task_of
    samples["id_hash"] = np.random.default_rng(7).integers(0, 2**63, len(durations), dtype=np.uint64)
    shards = [
        {"url": f"toy-{i:06d}.tar", "nsamples": int(size), "filesize": 0, "sha256": ""}
        for i, size in enumerate(shard_sizes)
    ]
    index = {
        "name": "toy",
        "shardlist": shards,
        "tasks": list(tasks),
        "langs": ["en"],
        "codecs": ["flac"],
        "hours": 0.0,
        "fingerprint": f"{folder}-{len(durations)}",
    }
    return ShardIndex(Path(folder), index, samples)
