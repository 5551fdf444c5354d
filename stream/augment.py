"""Augmentation of waveforms in the workers. Its randomness is a function of (seed, epoch, sample id) and
nothing else, so that a resumed run, another number of ranks or of workers gets the same clips."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from model.config import SoundwaveConfig
from model.encoder import encoder_sizes
from model.pretrained import locate
from recipe.config import DataConfig, RecipeError
from stream.plan import key64
from stream.reader import SAMPLE_RATE, Sample

# SpecAugment's policy LD (Park et al. 2019, table 1): two frequency masks of up to 27 of 80 mel channels, two
# time masks of up to 1 s; but no more than a fifth of a clip for one (LD: all of it), because many clips are
# short.
MASKS, MEL_MASK_SHARE, TIME_MASK_FRAMES, TIME_MASK_SHARE = 2, 27 / 80, 100, 0.2
_HOP = 160  # samples between mel frames


def is_on(data: DataConfig) -> bool:
    """Whether waveforms are changed."""
    return bool(data.speed_perturb or data.noise_snr_db)


def mel_channels(data: DataConfig, config: SoundwaveConfig) -> int | None:
    """Mel channels of the encoder where data.spec_augment needs to know them. Errors: RecipeError where it
    has none."""
    if not data.spec_augment:
        return None
    sizes = encoder_sizes(locate(config.encoder.name, sizes_only=True).config)
    channels = getattr(sizes, "num_mel_bins", None)
    if channels is None:
        raise RecipeError(
            f"data.spec_augment masks mel spectrograms, and {config.encoder.name} uses none: turn it off"
        )
    return int(channels)


def check(data: DataConfig) -> None:
    """Errors: RecipeError for settings that cannot be."""
    if any(not 0.5 <= factor <= 2 for factor in data.speed_perturb):
        raise RecipeError(
            f"data.speed_perturb={list(data.speed_perturb)}: factors lie between 0.5 and 2, e.g. [0.9, 1.0, "
            f"1.1]"
        )
    if data.noise_snr_db and (len(data.noise_snr_db) != 2 or data.noise_snr_db[0] > data.noise_snr_db[1]):
        raise RecipeError(
            f"data.noise_snr_db={list(data.noise_snr_db)}: give [lowest, highest] in dB, e.g. [10, 30]"
        )
    if data.cache_features and (is_on(data) or data.spec_augment):
        raise RecipeError(
            "data.cache_features stores what the frozen encoder makes of the clean clips: "
            "speed_perturb, noise_snr_db and spec_augment must be off with it"
        )


@lru_cache(maxsize=16)
def _speed(factor: float):
    from torchaudio.transforms import Speed

    return Speed(SAMPLE_RATE, factor)


def augment(waveform: torch.Tensor, data: DataConfig, epoch: int, sample_id: str) -> torch.Tensor:
    """waveform [S] at 16 kHz -> [S'] : played faster or slower by one of `speed_perturb`, white noise at an
    SNR drawn evenly from `noise_snr_db`. A longer clip than data.max_seconds is left at its speed: the batch
    budgets count the length it had."""
    random = np.random.Generator(np.random.PCG64(int(key64("augment", data.seed, epoch, sample_id))))
    if data.speed_perturb:
        factor = float(data.speed_perturb[random.integers(len(data.speed_perturb))])
        if factor != 1.0 and len(waveform) / factor <= data.max_seconds * SAMPLE_RATE:
            waveform, _ = _speed(factor)(waveform)
    if data.noise_snr_db:
        low, high = data.noise_snr_db
        snr = random.uniform(low, high)
        noise = torch.from_numpy(random.standard_normal(len(waveform), dtype=np.float32))
        power = waveform.square().mean().clamp(min=1e-10)
        waveform = waveform + noise * (power / 10 ** (snr / 10)).sqrt()
    return waveform


def mel_mask(samples: int, channels: int, data: DataConfig, epoch: int, sample_id: str) -> torch.Tensor:
    """SpecAugment's masks for the log-mel spectrogram of a clip of that many samples: [channels, frames]
    bool, True: masked.

    Drawn by torchaudio in the worker; the model lays them over the spectrogram that it computes on its
    device.
    """
    from torchaudio.functional import mask_along_axis

    keep = torch.ones(1, channels, max(-(-samples // _HOP), 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(
            int(key64("spec_augment", data.seed, epoch, sample_id)) >> 1
        )  # torchaudio draws from the global one
        for _ in range(MASKS):
            keep = mask_along_axis(keep, round(MEL_MASK_SHARE * channels), 0.0, 1)
            keep = mask_along_axis(keep, TIME_MASK_FRAMES, 0.0, 2, p=TIME_MASK_SHARE)
    return keep[0] == 0


def augmented(
    waveform: torch.Tensor, meta: dict, data: DataConfig, epoch: int, channels: int | None
) -> Sample:
    """A clip with whatever the recipe asks for. channels: mel channels of the encoder, where spec_augment is
    on."""
    name = f"{meta.get('corpus')}/{meta.get('id')}"
    if is_on(data):
        waveform = augment(waveform, data, epoch, name)
    mask = None
    if data.spec_augment and channels is not None:
        mask = mel_mask(len(waveform), channels, data, epoch, name)
    return Sample(meta, waveform, mel_mask=mask)
