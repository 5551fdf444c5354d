"""Waveforms as callers have them -> what the network takes: float32, mono, 16 kHz, full scale 1. The one
place that converts them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from core.audio import Audio, AudioError, to_mono
from model.features import SAMPLE_RATE

Waveform: TypeAlias = "torch.Tensor | np.ndarray | Sequence[float]"
MOST_CHANNELS = 16  # the shorter side of a two-dimensional waveform holds channels, at most so many
LOUDEST = 64.0  # of full scale; beyond it samples are integers that were not scaled
_FULL_SCALES = {"int16": 32768.0, "int32": 2147483648.0, "int8": 128.0}


class SoundWarning(UserWarning):
    """Something about one clip that its answer may suffer from."""


class ClipProblem(ValueError):
    """One clip that cannot be used; the others can."""


def mono(waveform: Waveform, sampling_rate: int = SAMPLE_RATE) -> tuple[torch.Tensor, list[str]]:
    """Return a waveform as [S] float32 at 16 kHz, full scale 1, and findings about it.

    waveform: tensor or array of samples [S], or of channels [C, S] or [S, C], which are averaged (where they
    cancel out, the loudest one is taken); floats with full scale 1, or int8, int16 or int32. Errors:
    ClipProblem for a clip without samples or with NaN or infinity; ValueError for what is no waveform.
    """
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        waveform = waveform.float() if waveform.dtype == torch.bfloat16 else waveform  # numpy has none
    samples = np.asarray(waveform)
    if samples.ndim in (1, 2) and not samples.size:
        raise ClipProblem("holds no samples")
    samples = _by_frames(samples)
    if samples.dtype.name in _FULL_SCALES:
        samples = samples / np.float32(_FULL_SCALES[samples.dtype.name])
    elif samples.dtype == np.uint8:
        samples = (samples - np.float32(128)) / np.float32(128)
    elif samples.dtype.kind != "f":
        raise ValueError(f"a waveform of {samples.dtype}: give floats between -1 and 1, or int16")
    samples = samples.astype(np.float32, copy=False)
    finite = np.isfinite(samples)
    if not finite.all():
        bad = int((~finite).any(axis=1).argmax())
        raise ClipProblem(f"holds NaN or infinity, first at sample {bad} of {len(samples)}")
    if (loudest := float(np.abs(samples).max())) > LOUDEST:
        raise ValueError(
            f"a waveform with samples up to {loudest:.5g}: give floats between -1 and 1 (16-bit samples "
            f"divided by "
            "32768), or int16"
        )
    if (
        isinstance(sampling_rate, bool)
        or not isinstance(sampling_rate, (int, np.integer))
        or sampling_rate <= 0
    ):
        raise ValueError(f"sampling_rate is {sampling_rate!r}: give samples a second, as 16000")
    try:
        audio = to_mono(Audio(samples, int(sampling_rate)), SAMPLE_RATE, levels=False)
    except AudioError as error:
        if error.reason == "zero_length":
            raise ClipProblem(str(error)) from None
        raise ValueError(f"a waveform at sampling_rate={sampling_rate}: {error}") from None
    return torch.from_numpy(audio.samples), [finding.detail for finding in audio.findings]


def _by_frames(samples: np.ndarray) -> np.ndarray:
    """[S], [C, S] or [S, C] -> [S, C]. Errors: ValueError."""
    if samples.ndim == 1:
        return samples[:, None]
    if samples.ndim == 2:
        first, second = samples.shape
        channels = min(first, second)
        if channels <= MOST_CHANNELS and (first != second or channels <= 1):
            return samples if second < first else samples.T
    raise ValueError(
        f"a waveform of shape {list(samples.shape)}: give samples [S], or channels [C, S] or [S, C]"
    )


def usable_clips(
    waveforms: Sequence[Waveform], sampling_rate: int = SAMPLE_RATE
) -> tuple[list[torch.Tensor], list[int]]:
    """Return each waveform by `mono`, and the numbers of those that cannot be used: silence replaces
    them, and a SoundWarning names them. Errors: ValueError, also where none can be used."""
    clips, unusable, problems = [], [], []
    for number, waveform in enumerate(waveforms):
        try:
            clip, findings = mono(waveform, sampling_rate)
        except ClipProblem as problem:
            clip, findings = torch.zeros(SAMPLE_RATE // 5), [f"{problem}: it is not answered"]
            unusable.append(number)
            problems.append(f"waveform {number} {problem}")
        except ValueError as error:
            raise ValueError(f"waveform {number}: {error}") from None
        clips.append(clip)
        for text in findings:
            warnings.warn(f"waveform {number} {text}", SoundWarning, stacklevel=4)
    if unusable and len(unusable) == len(clips):
        raise ValueError("; ".join(problems))
    return clips, unusable
