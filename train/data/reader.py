"""From a planned utterance to its waveform and JSON: read by offset, retry, decode, check, augment."""

from __future__ import annotations

import io
import logging
import time
from dataclasses import dataclass
from functools import lru_cache

import miniaudio
import numpy as np
import soundfile
import torch

from data_tools.audio import check_rate
from data_tools.shards import ShardIndex
from data_tools.sources import ClipError
from train.config import DataConfig
from train.data.rejected import BrokenSample, UnreadableSample

SAMPLE_RATE = 16_000
RETRY_PAUSES = (0.2, 1.0, 5.0)  # seconds before each further attempt at a read that the file system refused
LOGGER = logging.getLogger(__name__)


@dataclass
class Sample:
    """One utterance, ready to be collated. waveform [S] float32 at 16 kHz, or None for a text-only turn."""

    meta: dict  # KEY.json
    waveform: torch.Tensor | None
    features: torch.Tensor | None = None  # [T, D] from the feature cache, in place of the waveform
    mel_mask: torch.Tensor | None = None  # [n_mels, F] bool, where data.spec_augment is on
    dropout_key: int = 0  # of this utterance in this pass over its corpus

    @property
    def has_audio(self) -> bool:
        return self.waveform is not None or self.features is not None


@lru_cache(maxsize=16)
def _resampler(rate: int):
    from torchaudio.transforms import Resample  # keeps its kernel: one per rate and worker

    return Resample(rate, SAMPLE_RATE)


def decode(audio: bytes) -> torch.Tensor:
    """Any format that libsndfile reads -> waveform [S] float32, mono (mean of channels), 16 kHz.

    Errors: BrokenSample for what cannot be decoded, holds no samples, holds NaN or infinite values, or has a
    rate that is not resampled.
    """
    flac = _by_dr_flac(audio)
    data, rate = flac or _by_libsndfile(audio)
    if len(data) == 0:
        raise BrokenSample("audio holds no samples")
    mono = data[:, 0] if data.shape[1] == 1 else data.mean(axis=1)
    # FLAC holds whole numbers; elsewhere one NaN or infinity anywhere spoils the sum.
    if not flac and not np.isfinite(mono.sum(dtype=np.float64)):
        raise BrokenSample("audio holds NaN or infinite samples")
    waveform = torch.from_numpy(np.ascontiguousarray(mono))
    if rate == SAMPLE_RATE:
        return waveform
    try:
        check_rate(rate, SAMPLE_RATE)
    except ClipError as error:
        raise BrokenSample(f"audio at {error}") from None
    return _resampler(rate)(waveform)


def _by_libsndfile(audio: bytes) -> tuple[np.ndarray, int]:
    try:
        return soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, MemoryError) as error:  # the latter: no length in its header
        raise BrokenSample(f"audio cannot be decoded: {error}") from None


def _by_dr_flac(audio: bytes) -> tuple[np.ndarray, int] | None:
    """A whole FLAC file; None for anything else. It takes 0.6 of libFLAC's time and gives the same samples.

    dr_flac leaves out damaged frames without a word, so its answer counts only where it is as long as the header says.
    """
    if audio[:4] != b"fLaC":
        return None
    samples = int.from_bytes(audio[18:26], "big") & ((1 << 36) - 1)  # of STREAMINFO; 0: the encoder did not know
    try:
        sound = miniaudio.flac_read_f32(audio)
    except miniaudio.DecodeError:
        return None
    if not samples or len(sound.samples) != samples * sound.nchannels:
        return None
    return np.frombuffer(sound.samples, np.float32).reshape(samples, sound.nchannels), sound.sample_rate


def read_with_retry(index: ShardIndex, row: int, pauses: tuple[float, ...] | None = None) -> tuple[bytes | None, dict, int]:
    """index.read(row) and the number of retries it took.

    What the file system refuses (a stalled or remounted NFS, a vanished shard) is tried again after `pauses` (RETRY_PAUSES);
    content that is wrong is not. Errors: BrokenSample with the last reason, UnreadableSample where the file system refused.
    """
    pauses = RETRY_PAUSES if pauses is None else pauses
    for attempt, pause in enumerate((*pauses, None)):
        try:
            return *index.read(row), attempt
        except OSError as error:
            why = error
        except ValueError as error:  # ShardError: of the content, unless an OSError lies beneath
            if not isinstance(error.__cause__, OSError):
                raise BrokenSample(str(error)) from None
            why = error
        if pause is None:
            raise UnreadableSample(f"cannot be read after {attempt + 1} attempt(s): {why}")
        LOGGER.warning("reading sample %d: %s; trying again in %g s", row, why, pause)
        index.close()  # stale handles do not come back by themselves
        time.sleep(pause)
    raise AssertionError("unreachable")


def check_length(waveform: torch.Tensor, data: DataConfig) -> None:
    """The index promised a length within the recipe's limits; a file that holds another one would break the budgets."""
    seconds = len(waveform) / SAMPLE_RATE
    if not data.min_seconds * 0.99 <= seconds <= data.max_seconds * 1.01:
        raise BrokenSample(f"audio lasts {seconds:.2f} s, outside data.min_seconds={data.min_seconds:g} to "
                           f"data.max_seconds={data.max_seconds:g}: the index says otherwise")
