"""What goes into the network: one micro-batch, as tensors. The data stream makes it, the model reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


@dataclass
class Batch:
    """One micro-batch of B conversations that hold A audios in all.

    Audios have the order of their `<audio_patch>` positions, row by row. A micro-batch without audio
    still carries one silent dummy (`audio_is_dummy`): under ZeRO-3 every rank must run the audio path, and
    the dummy adds zero.
    """

    # Audio: exactly one of waveforms and features is given.
    waveforms: torch.Tensor | None  # [A, S] float32 at 16 kHz, zero padded
    features: torch.Tensor | None  # [A, T, D] cached output of the frozen encoder, zero padded
    audio_lengths: torch.Tensor  # [A] int64: samples of each waveform, or frames of each feature sequence
    audio_is_dummy: bool
    # CTC targets; an audio without a transcript takes no part in the CTC term.
    ctc_targets: torch.Tensor  # [A, U] int64 token ids of the LLM's vocabulary, padded with 0
    ctc_target_lengths: torch.Tensor  # [A] int64
    has_transcript: torch.Tensor  # [A] bool
    # Text: right padded for training. Stage 1 leaves these as [A, 0].
    input_ids: torch.Tensor  # [B, L] int64, one `<audio_patch>` id per audio
    attention_mask: torch.Tensor  # [B, L] int64, 1 for real tokens
    labels: torch.Tensor  # [B, L] int64, -100 where nothing is to be predicted
    ids: list[str] = field(default_factory=list)  # sample id of each row, for messages and logs
    tasks: list[str] = field(default_factory=list)
    languages: list[str | None] = field(
        default_factory=list
    )  # of each row's answer, as the data has it, for error rates
    # SpecAugment: True where the log-mel is masked, [A, n_mels, F]; only with waveforms.
    mel_mask: torch.Tensor | None = None
    # Dropout's keys, one of each utterance and pass over its corpus (model/dropout.py); None: the batch is
    # not trained on.
    audio_keys: torch.Tensor | None = None  # [A] int64
    row_keys: torch.Tensor | None = None  # [B] int64
    audio_rows: torch.Tensor | None = None  # [A] int64: the row of each audio

    @property
    def sounds(self) -> torch.Tensor:
        """Return the waveforms. Errors: ValueError for a batch of cached features."""
        if self.waveforms is None:
            raise ValueError("the batch holds cached features: this needs its waveforms")
        return self.waveforms

    def to(self, device: torch.device | str) -> Batch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def at_step(self, key: int) -> Batch:
        """The batch with the dropout of one step: its utterances' keys mixed with the step's (a signed 64-bit
        number)."""
        from model.ops import mix64  # not above: readers of data make batches, and need no ops

        keys: dict[str, Any] = {
            name: mix64(value ^ key)
            for name in ("audio_keys", "row_keys")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **keys)

    @property
    def ce_count(self) -> int:
        """Target tokens of the cross-entropy term (the label of position i is predicted at i - 1)."""
        return int((self.labels[:, 1:] != -100).sum())

    @property
    def ctc_count(self) -> int:
        """Transcribed utterances: the CTC term's denominator."""
        return int(self.has_transcript.sum())
