"""Augmentation of waveforms in the workers. Its randomness is a function of (seed, epoch, sample id) and nothing else, so
that a resumed run, another number of ranks or of workers hears the same clips."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from train.config import DataConfig, RecipeError
from train.data.plan import key64
from train.data.reader import SAMPLE_RATE


def is_on(data: DataConfig) -> bool:
    return bool(data.speed_perturb or data.noise_snr_db)


def check(data: DataConfig) -> None:
    """Errors: RecipeError for settings that cannot be."""
    if any(not 0.5 <= factor <= 2 for factor in data.speed_perturb):
        raise RecipeError(f"data.speed_perturb={list(data.speed_perturb)}: factors lie between 0.5 and 2, e.g. [0.9, 1.0, 1.1]")
    if data.noise_snr_db and (len(data.noise_snr_db) != 2 or data.noise_snr_db[0] > data.noise_snr_db[1]):
        raise RecipeError(f"data.noise_snr_db={list(data.noise_snr_db)}: give [lowest, highest] in dB, e.g. [10, 30]")
    if data.cache_features and (is_on(data) or data.spec_augment):
        raise RecipeError("data.cache_features stores what the frozen encoder makes of the clean clips: "
                          "speed_perturb, noise_snr_db and spec_augment must be off with it")


@lru_cache(maxsize=16)
def _speed(factor: float):
    from torchaudio.transforms import Speed

    return Speed(SAMPLE_RATE, factor)


def augment(waveform: torch.Tensor, data: DataConfig, epoch: int, sample_id: str) -> torch.Tensor:
    """waveform [S] at 16 kHz -> [S'] : played faster or slower by one of `speed_perturb`, white noise at an SNR drawn evenly
    from `noise_snr_db`. A longer clip than data.max_seconds is left at its speed: the batch budgets count the length it had."""
    random = np.random.Generator(np.random.PCG64(int(key64("augment", data.seed, epoch, sample_id))))
    if data.speed_perturb:
        factor = float(data.speed_perturb[random.integers(len(data.speed_perturb))])
        if factor != 1.0 and len(waveform) / factor <= data.max_seconds * SAMPLE_RATE:
            waveform, _ = _speed(factor)(waveform)
    if data.noise_snr_db:
        snr = random.uniform(*data.noise_snr_db)
        noise = torch.from_numpy(random.standard_normal(len(waveform), dtype=np.float32))
        power = waveform.square().mean().clamp(min=1e-10)
        waveform = waveform + noise * (power / 10 ** (snr / 10)).sqrt()
    return waveform
