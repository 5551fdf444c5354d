"""Inputs of the Conformer encoders: Kaldi's filter banks (w2v-BERT 2.0) and NeMo's log-mel (Parakeet).

Every clip is normalised over its own frames, so padding and other clips of a batch do not change it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank, window_function

from model.features import HOP, SAMPLE_RATE, WINDOW

FFT = 512
PREEMPHASIS = 0.97


def kaldi_frames(samples: torch.Tensor) -> torch.Tensor:
    """Frames of clips of that many samples, at least 400: only whole windows count."""
    return (samples - WINDOW) // HOP + 1


def kaldi_banks(waveforms: torch.Tensor, lengths: torch.Tensor, bins: int) -> torch.Tensor:
    """waveforms [A, S], lengths [A] (samples, at least two frames) -> [A, F, bins], 0 beyond a clip's
    frames; as transformers' SeamlessM4TFeatureExtractor."""
    frames = (waveforms.float() * 2**15).unfold(1, WINDOW, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    first = frames[..., :1] * (1 - PREEMPHASIS)
    frames = torch.cat([first, frames[..., 1:] - PREEMPHASIS * frames[..., :-1]], -1)
    window = torch.tensor(window_function(WINDOW, "povey", periodic=False), dtype=torch.float32)
    spectrum = torch.fft.rfft(frames * window.to(frames.device), FFT)
    power = torch.view_as_real(spectrum).square().sum(-1)
    log = (power @ _mel_filters("kaldi", bins).to(power.device)).clamp(min=1.192092955078125e-07).log()
    mean, variance, valid = _statistics(log, kaldi_frames(lengths))
    return ((log - mean) * (variance + 1e-7).rsqrt()).masked_fill(~valid, 0.0)


def nemo_frames(samples: torch.Tensor) -> torch.Tensor:
    """Frames of clips of that many samples."""
    return samples // HOP


def nemo_log_mel(waveforms: torch.Tensor, lengths: torch.Tensor, bins: int) -> torch.Tensor:
    """waveforms [A, S], lengths [A] (samples, at least two frames) -> [A, F, bins], 0 beyond a clip's
    frames; as transformers' ParakeetFeatureExtractor."""
    emphasised = torch.cat([waveforms[:, :1], waveforms[:, 1:] - PREEMPHASIS * waveforms[:, :-1]], 1).float()
    beyond = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    spectrum = torch.stft(
        emphasised.masked_fill(beyond, 0.0),
        FFT,
        hop_length=HOP,
        win_length=WINDOW,
        window=torch.hann_window(WINDOW, periodic=False, device=waveforms.device),
        pad_mode="constant",
        return_complex=True,
    )
    power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
    log = (power @ _mel_filters("slaney", bins).to(power.device) + 2**-24).log()
    log = log[:, : int(nemo_frames(lengths).max())]
    mean, variance, valid = _statistics(log, nemo_frames(lengths))
    return ((log - mean) / (variance.sqrt() + 1e-5)).masked_fill(~valid, 0.0)


def _statistics(x: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [A, F, C], frames [A] -> mean [A, 1, C] and unbiased variance [A, 1, C] over each clip's frames, and
    which frames count [A, F, 1]."""
    valid = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None]
    counts = frames[:, None, None]
    mean = (x * valid).sum(1, keepdim=True) / counts
    variance = ((x - mean).square() * valid).sum(1, keepdim=True) / (counts - 1)
    return mean, variance, valid


@lru_cache(maxsize=4)
def _mel_filters(scale: str, bins: int) -> torch.Tensor:
    """[257, bins]"""
    kaldi = scale == "kaldi"
    filters = mel_filter_bank(
        num_frequency_bins=FFT // 2 + 1,
        num_mel_filters=bins,
        min_frequency=20.0 if kaldi else 0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm=None if kaldi else "slaney",
        mel_scale=scale,
        triangularize_in_mel_space=kaldi,
    )
    return torch.tensor(filters, dtype=torch.float32)


def padded(waveforms: torch.Tensor, lengths: torch.Tensor, samples: int) -> torch.Tensor:
    """waveforms [A, S] with zeros beyond each clip's length and at least that many samples."""
    beyond = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    return F.pad(waveforms.masked_fill(beyond, 0.0), (0, max(0, samples - waveforms.shape[1])))
