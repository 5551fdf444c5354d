"""The largest micro-batch that a recipe allows, made up before step 0: memory overflows at minute 0, not at
hour 20."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedTokenizerBase

from model.batch import Batch
from model.config import SoundwaveConfig
from model.stages import STAGES
from recipe.config import DataConfig
from stream.cache import FeatureStore
from stream.collate import Collator, Prepared
from stream.reader import SAMPLE_RATE, Sample

TOKENS_PER_SECOND = 6  # of a transcript: fast speech, about 300 words a minute


def micro_batch_shape(data: DataConfig, micro_batch_seconds: float) -> tuple[int, float]:
    """Return the clips and the seconds of each in the largest micro-batch of that many seconds."""
    rows, seconds = max(int(micro_batch_seconds / data.max_seconds), 1), data.max_seconds
    slowed = micro_batch_seconds / min([1.0, *data.speed_perturb])
    if slowed > max(micro_batch_seconds, data.max_seconds):
        rows = math.ceil(slowed / data.max_seconds)
        seconds = slowed / rows
    return rows, seconds


def worst_case_batch(
    data: DataConfig, stage: str, tokenizer: PreTrainedTokenizerBase, model_config: SoundwaveConfig
) -> Batch:
    """A full micro-batch of the longest clips: as many of data.max_seconds as data.micro_batch_seconds holds
    (at least one).

    They hold noise, not speech, so that no blank run shortens them; transcripts are those of fast speech, and
    from stage 2 on the conversations fill data.micro_batch_tokens.

    Clips that data.speed_perturb slows are planned at their own length: together they exceed
    data.micro_batch_seconds by as much as it slows them, while none exceeds data.max_seconds
    (stream/augment.py).
    """
    rows, seconds = micro_batch_shape(data, data.micro_batch_seconds)
    samples = int(seconds * SAMPLE_RATE)
    noise = torch.Generator().manual_seed(data.seed)
    target = [i % 1000 for i in range(int(seconds * TOKENS_PER_SECOND))]
    features = None
    if data.cache_features:
        features = FeatureStore.open(data.cache_features, model_config)
    collator = Collator(
        tokenizer, model_config, stage, data.ctc_text, feature_width=features.width if features else None
    )
    prepared = []
    for row in range(rows):
        sample = Sample(
            {"id": f"worst case {row}", "task": "asr", "text": "a", "duration": seconds, "corpus": ""},
            torch.randn(samples, generator=noise) * 0.1,
        )
        if features is not None:
            frames = int(seconds * features.frame_rate)
            sample = Sample(sample.meta, None, torch.randn(frames, features.width, generator=noise))
        one = collator.prepare(sample)
        filler = (
            [
                target[i % len(target)]
                for i in range(max(data.micro_batch_tokens // rows - len(one.input_ids), 0))
            ]
            if STAGES[stage].needs_llm
            else []
        )
        prepared.append(Prepared(sample, one.input_ids + filler, one.labels + filler, target))
    return collator(prepared)
