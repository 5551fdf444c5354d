"""What can be said about a clip from its samples alone: level, clipping, noise, and where it is clearest."""

from __future__ import annotations

import numpy as np

_WINDOW_SECONDS, _HOP_SECONDS = 0.025, 0.010
_FLOOR_DB = -120.0


def _decibels(power: np.ndarray | float) -> np.ndarray | float:
    return 10 * np.log10(np.maximum(power, 10 ** (_FLOOR_DB / 10)))


def frame_power(samples: np.ndarray, rate: int) -> np.ndarray:
    """[samples] int16 -> [frames] mean square of 25 ms windows every 10 ms, full scale 1."""
    window, hop = max(1, round(_WINDOW_SECONDS * rate)), max(1, round(_HOP_SECONDS * rate))
    energy = np.concatenate([[0.0], np.cumsum((samples.astype(np.float64) / 32768.0) ** 2)])
    starts = np.arange(0, max(1, len(samples) - window + 1), hop)
    ends = np.minimum(starts + window, len(samples))
    return (energy[ends] - energy[starts]) / np.maximum(1, ends - starts)


def measure(samples: np.ndarray, rate: int) -> dict[str, float]:
    """[samples] int16 -> rms_db and peak_db (full scale 0), clipping (share of samples at full scale),
    snr_db.

    snr_db is an estimate: the 90th percentile of the frames' power against the 10th, which holds the pauses.
    It is high for clean speech and near 0 for steady noise or music.
    """
    power = frame_power(samples, rate)
    noise, loud = np.percentile(power, [10, 90])
    floor = 10 ** (_FLOOR_DB / 10)
    peak = float(np.abs(samples.astype(np.int32)).max()) / 32768.0
    return {
        "rms_db": round(float(_decibels(float(np.mean((samples.astype(np.float64) / 32768.0) ** 2)))), 2),
        "peak_db": round(float(_decibels(peak**2)), 2),
        "clipping": round(float(np.mean((samples >= 32767) | (samples <= -32768))), 6),
        "snr_db": round(float(_decibels(max(loud - noise, floor) / max(noise, floor))), 2),
    }


def clearest(samples: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """The `seconds` long stretch with the most energy over the clip's own noise floor; a shorter clip as it
    is.

    The floor (10th percentile) is taken off first, so that a long hum does not win against a short bark.
    """
    length = round(seconds * rate)
    if len(samples) <= length:
        return samples
    power = frame_power(samples, rate)
    above = np.maximum(power - np.percentile(power, 10), 0.0)
    frames = max(1, round(seconds / _HOP_SECONDS))
    sums = np.cumsum(np.concatenate([[0.0], above]))
    ends = np.minimum(np.arange(len(above)) + frames, len(above))
    totals = sums[ends] - sums[: len(above)]
    hop = max(1, round(_HOP_SECONDS * rate))
    # A short sound fits many stretches: the middle one of those about as good as the best leaves air on both
    # sides.
    best = int(totals.argmax())
    worse = np.flatnonzero(totals < 0.99 * totals[best])
    first = worse[worse < best].max(initial=-1) + 1
    last = worse[worse > best].min(initial=len(totals)) - 1
    start = min(int(first + last) // 2 * hop, len(samples) - length)
    return samples[start : start + length]
