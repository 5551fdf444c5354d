"""From a planned utterance to its waveform and JSON: read by offset, retry, decode, check, augment."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from core.audio import MAX_SECONDS, SAMPLE_RATE, AudioError
from core.audio import decode as decode_audio
from data_tools.shards import ShardIndex
from recipe.config import DataConfig
from stream.rejected import BrokenSample, UnreadableSample

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


def decode(audio: bytes, max_seconds: float = MAX_SECONDS, findings: list[str] | None = None) -> torch.Tensor:
    """A clip's bytes -> waveform [S] float32, mono, 16 kHz, of at most `max_seconds`. Findings about it are
    added to `findings`, where a list is given. Errors: BrokenSample."""
    try:
        decoded = decode_audio(audio, levels=findings is not None, max_seconds=max_seconds)
    except AudioError as error:
        raise BrokenSample(f"audio cannot be used ({error.reason}): {error}") from None
    if findings is not None:
        findings += [finding.detail for finding in decoded.findings]
    return torch.from_numpy(decoded.samples)


def read_with_retry(
    index: ShardIndex, row: int, pauses: tuple[float, ...] | None = None
) -> tuple[bytes | None, dict, int]:
    """index.read(row) and the number of retries it took.

    What the file system refuses (a stalled or remounted NFS, a vanished shard) is tried again after `pauses`
    (RETRY_PAUSES); content that is wrong is not. Errors: BrokenSample with the last reason, UnreadableSample
    where the file system refused.
    """
    pauses = RETRY_PAUSES if pauses is None else pauses
    for attempt, pause in enumerate((*pauses, None)):
        try:
            return *index.read(row), attempt
        except OSError as error:
            why: Exception = error
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
    """The index promised a length within the recipe's limits; a file that holds another one would break the
    budgets."""
    seconds = len(waveform) / SAMPLE_RATE
    if not data.min_seconds * 0.99 <= seconds <= data.max_seconds * 1.01:
        raise BrokenSample(
            f"audio lasts {seconds:.2f} s, outside data.min_seconds={data.min_seconds:g} to "
            f"data.max_seconds={data.max_seconds:g}: the index says otherwise"
        )
