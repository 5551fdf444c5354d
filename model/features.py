"""Log-mel spectrograms as Whisper defines them, in torch, at the true length of each clip.

Source of the definition: Radford et al. 2022, section 2.2, and OpenAI's `audio.py`: 25 ms Hann windows every
10 ms, power spectrum, Slaney mel filters up to 8 kHz, log10 with floor 1e-10, clamped to 8 below the clip's
own maximum, then (x + 4) / 4.

Whisper pads a clip with silence to 30 s first. Frame t depends only on samples 160 t - 200 ... 160 t + 199,
and silence never is the maximum (unless the whole clip is), so the frames of the clip itself can be had
without those 30 s, to the last bit of the definition. Two things decide whether that holds at the clip's end,
and both are kept:
- the last frames see silence behind the clip, not its mirror image: zeros are put there before the transform,
  whatever the batch's padding holds (Whisper mirrors the signal at 30 s only, so a clip within 400 samples of
  30 s is padded to exactly 30 s);
- the maximum is taken over the frames that begin behind the clip's end and still see its last samples, too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE = 16_000
HOP = 160  # samples between frames: 100 frames a second
WINDOW = 400  # samples of one window
WINDOW_SECONDS = 30.0  # what Whisper encodes at once
_FULL = int(WINDOW_SECONDS * SAMPLE_RATE)


@lru_cache(maxsize=8)
def _filters(n_mels: int, device: torch.device) -> torch.Tensor:
    """Slaney mel filters [n_mels, 201]. Kept out of the modules: an engine that casts buffers to bf16 must
    not touch them."""
    bank = mel_filter_bank(
        1 + WINDOW // 2, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bank).to(device, torch.float32).T.contiguous()


def mel_frames(samples: torch.Tensor) -> torch.Tensor:
    """Frames of a clip of that many samples: one per started 10 ms, at least one."""
    return torch.div(samples + HOP - 1, HOP, rounding_mode="floor").clamp(min=1)


def log_mel(
    waveforms: torch.Tensor, lengths: torch.Tensor, n_mels: int, pad_to_samples: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """waveforms [A, S] at 16 kHz, lengths [A] in samples -> mel [A, n_mels, F] float32, frames [A].

    Padding in `waveforms` does not affect the result. `mel` is zero behind a clip's frames,
    unless `pad_to_samples` asks for Whisper's own way (480000: 30 s): then F = pad_to_samples / 160 frames
    are filled, silence included, and `frames` still counts those of the clip.
    """
    waveforms, longest = waveforms.float(), waveforms.shape[1]
    if pad_to_samples is not None and longest > pad_to_samples:
        raise ValueError(
            f"a clip of {longest / SAMPLE_RATE:.2f} s does not fit into {pad_to_samples / SAMPLE_RATE:.2f} s"
        )
    with torch.autocast(waveforms.device.type, enabled=False):
        compute = _each if waveforms.device.type == "cpu" else _together
        return compute(waveforms, lengths, n_mels, pad_to_samples), mel_frames(lengths)


def _together(
    waveforms: torch.Tensor, lengths: torch.Tensor, n_mels: int, pad_to_samples: int | None
) -> torch.Tensor:
    """All clips at once, as a GPU likes it."""
    longest = waveforms.shape[1]
    positions = torch.arange(longest, device=waveforms.device)
    waveforms = waveforms.masked_fill(positions >= lengths[:, None], 0.0)
    size = pad_to_samples or (_FULL if _FULL - WINDOW < longest <= _FULL else longest + WINDOW)
    padded = F.pad(F.pad(waveforms, (0, size - longest)), (WINDOW // 2, WINDOW // 2), mode="reflect")
    frames = padded.unfold(1, WINDOW, HOP)[:, : size // HOP] * torch.hann_window(
        WINDOW, device=waveforms.device
    )
    power = torch.view_as_real(torch.fft.rfft(frames)).square_().sum(-1)
    log = torch.matmul(_filters(n_mels, waveforms.device), power.transpose(1, 2)).clamp(min=1e-10).log10()
    mel = (torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
    if pad_to_samples is not None:
        return mel
    mel = mel[..., : int(mel_frames(torch.tensor(longest)))]
    behind = torch.arange(mel.shape[-1], device=mel.device) >= mel_frames(lengths)[:, None]
    return mel.masked_fill(behind[:, None], 0.0)


def _each(
    waveforms: torch.Tensor, lengths: torch.Tensor, n_mels: int, pad_to_samples: int | None
) -> torch.Tensor:
    """Clip by clip in the same memory, as a CPU likes it: a clip's spectrum stays in cache, and silence is
    not transformed."""
    longest, half, bins = waveforms.shape[1], WINDOW // 2, WINDOW // 2 + 1
    most = pad_to_samples // HOP if pad_to_samples else int(mel_frames(torch.tensor(longest)))
    mel = waveforms.new_zeros(len(waveforms), n_mels, most)
    window, filters = torch.hann_window(WINDOW), _filters(n_mels, waveforms.device).T
    samples = waveforms.new_zeros(max(longest, pad_to_samples or 0) + 2 * WINDOW)
    framed, power, logs = (waveforms.new_empty(most + 2, width) for width in (WINDOW, bins, n_mels))
    spectra = waveforms.new_empty(most + 2, bins, dtype=torch.complex64)
    one = torch.ones(())
    for clip, length, out in zip(waveforms, lengths.tolist(), mel, strict=True):
        size = pad_to_samples or (_FULL if _FULL - WINDOW < length <= _FULL else length + WINDOW)
        padded = samples[: size + WINDOW]
        padded[half : half + length] = clip[:length]
        padded[half + length :] = 0.0
        padded[:half] = padded[half + 1 : WINDOW + 1].flip(0)  # the mirror image, without the edge
        if size - length <= half:  # the mirror image at the end: elsewhere it is of silence
            padded[half + size :] = padded[size - 1 : half + size - 1].flip(0)
        frames = min((length + half - 1) // HOP + 1, size // HOP)  # frames that see a sample of the clip
        torch.mul(padded.unfold(0, WINDOW, HOP)[:frames], window, out=framed[:frames])
        # The transform of frames leaves a frame's bins side by side, which torch.stft does not.
        squares = torch.view_as_real(torch.fft.rfft(framed[:frames], out=spectra[:frames])).square_()
        torch.add(squares[..., 0], squares[..., 1], out=power[:frames])
        log = torch.mm(power[:frames], filters, out=logs[:frames]).clamp_(min=1e-10).log10_()
        floor = log.max() - 8.0
        shown = frames if pad_to_samples else (length + HOP - 1) // HOP or 1
        torch.add(
            one, torch.maximum(log, floor, out=log)[:shown].T, alpha=0.25, out=out[:, :shown]
        )  # (x + 4) / 4, to the bit
        if pad_to_samples:
            out[:, frames:] = (floor.clamp(min=-10.0) + 4.0) / 4.0  # of silence
    return mel
