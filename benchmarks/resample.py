"""Measure the quality and speed of resamplers in one run.

    python -m benchmarks.resample [--out FILE]

soxr (HQ, what core/audio.py uses) against torchaudio's Resample at its defaults, from several rates to 16
kHz, in one run:

    passband   largest change of level of tones up to 7 kHz (3.5 kHz from 8 kHz), dB
    SNR        smallest, of those tones against a fitted tone: whatever is not the tone is error, dB
    rejected   least attenuation of what does not belong into the result: tones from 9 kHz on that must
               vanish, and mirror images above the source's band; dB
    ms         processor time for 10 s of noise on one thread, best of `--repeats` runs in turn; torchaudio's
               filter is kept

torchaudio's filter for a rate that shares hardly a divisor with 16 kHz takes gigabytes: it is left out there.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.machine import keep, machine
from core.command_line import CommandParser, accept_old_name

TARGET = 16_000
RATES = (8_000, 11_025, 22_050, 22_254, 24_000, 32_000, 44_100, 48_000, 96_000)
_MAX_FILTER = 1 << 24  # numbers
SECONDS = 2.0

Resampler = Callable[[np.ndarray], np.ndarray]


def by_soxr(rate: int) -> Resampler:
    from core.audio import resample

    return lambda samples: resample(samples, rate, TARGET)


def by_torchaudio(rate: int) -> Resampler | None:
    import torch
    from torchaudio.transforms import Resample

    common = math.gcd(rate, TARGET)
    if (rate // common) * (TARGET // common) > _MAX_FILTER:
        return None
    transform = Resample(rate, TARGET)

    def resample(samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return transform(torch.from_numpy(samples)).numpy()

    return resample


def tone(hertz: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(SECONDS * rate)) / rate)).astype(np.float32)


def fitted(samples: np.ndarray, hertz: float) -> tuple[float, float]:
    """(amplitude of a tone fitted to the middle of the samples, root mean square of what is left)."""
    edge = TARGET // 10
    middle = samples[edge:-edge].astype(np.float64)
    phase = 2 * np.pi * hertz * np.arange(len(middle)) / TARGET
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights = np.linalg.lstsq(basis, middle, rcond=None)[0]
    return float(np.hypot(*weights)), float(np.sqrt(np.mean((middle - basis @ weights) ** 2)))


def decibels(ratio: float) -> float:
    return 20 * math.log10(max(ratio, 1e-9))


def quality(resampler: Resampler, rate: int) -> dict[str, float]:
    band = min(7_000.0, 0.4375 * rate)
    levels, snrs, left = [], [], []
    for hertz in np.linspace(50, band, 40):
        amplitude, residue = fitted(resampler(tone(hertz, rate)), hertz)
        levels.append(abs(decibels(amplitude / 0.5)))
        snrs.append(decibels(amplitude / math.sqrt(2) / max(residue, 1e-9)))
        if rate < TARGET:
            left.append(decibels(image(resampler, rate, hertz) / 0.5))
    for hertz in np.linspace(9_000, min(rate / 2, 20_000), 40) if rate > 2 * 9_000 else ():
        edge = TARGET // 10
        left.append(
            decibels(
                float(np.sqrt(2 * np.mean(resampler(tone(hertz, rate))[edge:-edge].astype(np.float64) ** 2)))
                / 0.5
            )
        )
    return {"passband_db": max(levels), "snr_db": min(snrs), "rejected_db": -max(left) if left else math.nan}


def image(resampler: Resampler, rate: int, hertz: float) -> float:
    """Amplitude of a tone's mirror image above the source's band."""
    mirrored = rate - hertz
    return fitted(resampler(tone(hertz, rate)), mirrored)[0] if mirrored < TARGET / 2 else 0.0


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser("python -m benchmarks.resample", __doc__, example="--repeats 5")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each side; the least counts")
    accept_old_name(parser, "--repeat", "--repeats")
    parser.add_argument("--out", type=Path, help="where to write the numbers, the table beside them (.txt)")
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    facts = machine()
    rows = []
    for rate in RATES:
        ways = {"soxr HQ": by_soxr(rate), "torchaudio": by_torchaudio(rate)}
        noise = np.random.default_rng(0).normal(0, 0.1, 10 * rate).astype(np.float32)
        best = dict.fromkeys(ways, math.inf)
        for _ in range(options.repeats):
            for name, resampler in ways.items():
                if resampler is not None:
                    started = time.process_time()
                    resampler(noise)
                    best[name] = min(best[name], 1000 * (time.process_time() - started))
        rows += [
            {"rate": rate, "way": name, "ms": best[name], **quality(resampler, rate)}
            for name, resampler in ways.items()
            if resampler is not None
        ]
    lines = [f"{'from':>7}  {'way':<12}{'passband dB':>12}{'SNR dB':>9}{'rejected dB':>13}{'ms / 10 s':>11}"]
    for row in rows:
        numbers = (
            f"{row['passband_db']:>12.4f}{row['snr_db']:>9.1f}{row['rejected_db']:>13.1f}{row['ms']:>11.2f}"
        )
        lines.append(f"{row['rate']:>7}  {row['way']:<12}{numbers}")
    print("\n".join(lines))
    if options.out:
        keep(options.out, {"machine": facts, "rows": rows}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
