"""One recording as a batch: for the picture and the web page, where there are no shards."""

from __future__ import annotations

import torch

from model.batch import Batch
from model.prompt import chat_ids
from model.soundwave import Soundwave


def clip_batch(model: Soundwave, waveform: torch.Tensor, question: str | None = None) -> Batch:
    """waveform [S] at 16 kHz -> a batch of one, on the model's device; with a question, a prompt ready to be continued."""
    token = model.config.audio_token
    ids: list[int] = []
    if question is not None:
        turn = [{"role": "user", "content": f"{token}\n{question}" if question else token}]
        ids, _ = chat_ids(model.tokenizer, turn, model.config.prompt, token)
    input_ids, none = torch.tensor([ids], dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)
    batch = Batch(waveforms=waveform[None].float(), features=None, audio_lengths=torch.tensor([len(waveform)]),
                  audio_is_dummy=False, ctc_targets=none, ctc_target_lengths=torch.zeros(1, dtype=torch.long),
                  has_transcript=torch.zeros(1, dtype=torch.bool), input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
                  labels=torch.full_like(input_ids, -100), ids=["clip"])
    return batch.to(next(model.parameters()).device)
