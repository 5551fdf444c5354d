"""Decode a batch: one way for the Python API, the command line and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from model.batch import Batch
from model.generation.drafted import Drafting
from model.generation.joint import JointSearch
from model.language_model import LLM, base_of, end_ids
from model.soundwave import Audio, CTCFrames, Soundwave
from soundwave.vllm import VLLM, Sampling

Decode = Literal["ctc", "greedy", "drafted", "joint"]
DECODES: tuple[str, ...] = get_args(Decode)


@dataclass(frozen=True)
class Decoding:
    """How a batch is decoded. ctc: the CTC head's argmax, without the LLM | greedy: the LLM's answer |
    drafted: greedy's tokens, drafted by the CTC head | joint: beam search by both. do_sample, temperature
    and top_p count for greedy alone."""

    decode: Decode = "greedy"
    max_new_tokens: int = 200
    joint: JointSearch | None = None
    do_sample: bool = False
    temperature: float = 0.2
    top_p: float = 0.9
    drafted: Drafting | None = None

    def __post_init__(self) -> None:
        if self.decode not in DECODES:
            raise ValueError(f"decode is '{self.decode}': give {', '.join(DECODES)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")


class Decoded(NamedTuple):
    """What is written for one conversation."""

    text: str
    raw: str  # with special tokens
    tokens: int | None  # that were generated; None where the LLM took no part
    unanswered: str | None = None  # why there is no answer
    passes: int | None = None  # of the LLM, where the answer was drafted


def decode_batch(
    model: Soundwave,
    batch: Batch,
    decoding: Decoding,
    audio: Audio | None = None,
    limits: list[int] | None = None,
) -> list[Decoded]:
    """Return what a model writes for each conversation of a batch of prompts.

    audio: what `model.encode_audio` gives for the batch, where the caller has it. limits: of each answer's
    tokens, beside max_new_tokens. Errors: ValueError where the model cannot decode so.
    """
    if decoding.decode == "ctc":
        return [Decoded(text, text, None) for text in model.ctc_greedy(batch, audio=audio)]
    answers = model.generate(
        batch,
        max_new_tokens=min(decoding.max_new_tokens, max(limits or [decoding.max_new_tokens])),
        do_sample=decoding.do_sample,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        audio=audio,
        **_search(decoding),
    )
    if limits is not None:
        answers = [ids[:limit] for ids, limit in zip(answers, limits, strict=True)]
    passes = model.drafted_passes.row_passes if model.drafted_passes is not None else None
    return _decoded(model, answers, model.unanswered, passes)


@torch.inference_mode()
def begin_batch(
    model: Soundwave, batch: Batch, decoding: Decoding, vllm: VLLM
) -> Callable[[], list[Decoded]]:
    """Encode a batch and send its prompts to vLLM; return the function that waits for what `decode_batch`
    returns. Errors of that function: BackendError."""
    prompts = model.prompt_embeddings(batch, model.encode_audio(batch))
    unanswered = dict(model.unanswered)
    stop = end_ids(model.tokenizer, model.config.prompt, base_of(cast(LLM, model.llm)).generation_config)
    pending = {
        place: vllm.answer(
            prompt,
            max_tokens=model.answer_room(len(prompt), decoding.max_new_tokens),
            sampling=Sampling(),
            stop=stop,
        )
        for place, prompt in enumerate(prompts)
        if place not in unanswered
    }

    def finish() -> list[Decoded]:
        answers = [pending[place].result() if place in pending else [] for place in range(len(prompts))]
        return _decoded(model, answers, unanswered)

    return finish


def _decoded(
    model: Soundwave,
    answers: list[list[int]],
    unanswered: dict[int, str],
    passes: list[int] | None = None,
) -> list[Decoded]:
    tokenizer = model.tokenizer
    return [
        Decoded(
            str(tokenizer.decode(ids, skip_special_tokens=True)),
            str(tokenizer.decode(ids, skip_special_tokens=False)),
            len(ids),
            unanswered.get(place),
            None if passes is None else passes[place],
        )
        for place, ids in enumerate(answers)
    ]


def ctc_frames(model: Soundwave, batch: Batch, scanned: Mapping[int, tuple[torch.Tensor, ...]]) -> CTCFrames:
    """Return the frames of a batch's audio. scanned: of audios whose frames the caller has, by their number:
    hidden [T, D], argmax, peak and blank_logprob [T]; these are not encoded again."""
    parts, audios = dict(scanned), len(batch.audio_lengths)
    if new := [number for number in range(audios) if number not in parts]:
        left = replace(batch, waveforms=batch.sounds[new], audio_lengths=batch.audio_lengths[new])
        hidden, lengths = model.alignment(*model.encode(left))
        _, *scores = model.ctc_head(hidden, lengths)
        for place, (number, length) in enumerate(zip(new, lengths.tolist(), strict=True)):
            parts[number] = tuple(part[place, :length] for part in (hidden, *scores))
    ordered = [parts[number] for number in range(audios)]
    lengths = torch.tensor([len(part[0]) for part in ordered], device=batch.audio_lengths.device)
    hidden, *scores = (pad_sequence(list(one), batch_first=True) for one in zip(*ordered, strict=True))
    return CTCFrames(hidden, lengths, *scores)


def _search(decoding: Decoding) -> dict:
    """The options of `generate` that choose the search."""
    if decoding.decode == "joint":
        return {"joint": decoding.joint or JointSearch()}
    if decoding.decode == "drafted":
        return {"drafted": decoding.drafted or Drafting()}
    return {}


def rows_of(part: Batch | Audio, rows: list[int]):
    """Return some rows of a batch whose conversations have one audio each, or of its `Audio`."""
    if isinstance(part, Audio):
        return part.rows(rows)
    chosen: dict[str, Any] = {}
    for name in (one.name for one in fields(part)):
        value = getattr(part, name)
        if isinstance(value, torch.Tensor):
            chosen[name] = value[rows]
        elif isinstance(value, list) and value:
            chosen[name] = [value[row] for row in rows]
    return replace(part, **chosen)
