"""What the model makes of audio, for pictures: an extension of OpenAI's answers (`include`: `frames`)."""

from __future__ import annotations

from typing import Any

import torch

from core.spelling import spell
from model.generation.timestamps import Word, align_frames
from model.soundwave import Audio, Soundwave


def word_rows(words: list[Word]) -> list[dict]:
    return [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in words
    ]


def frames_of(model: Soundwave, audio: Audio, seconds: float, start: float, language: str | None) -> dict:
    """Return the frames of one audio, as docs/serve.md lists them. start: seconds, of its window in a
    recording."""
    length, kept = int(audio.lengths[0]), int(audio.kept_lengths[0])
    tokens = audio.argmax[0, :length].tolist()
    blank, known = model.ctc_head.blank, len(model.tokenizer)
    texts = {
        token: model.tokenizer.decode([token]) for token in set(tokens) if token != blank and token < known
    }
    (collapsed,) = model._ctc_tokens(audio)
    transcript = str(model.tokenizer.decode(collapsed, skip_special_tokens=True)).strip()
    spelling = spell(model.tokenizer, transcript, model.ctc_text, language)
    words = align_frames(model, audio.hidden, audio.lengths, [spelling], [seconds])[0].words
    return {
        "start": round(start, 3),
        "rate": _rate(model),
        "blank": blank,
        "tokens": tokens,
        "texts": texts,
        "log_probability": _rounded(audio.peak[0, :length]),
        "blank_probability": _rounded(audio.blank_logprob[0, :length].float().exp()),
        "kept": audio.kept[0, :kept].tolist(),
        "transcript": transcript,
        "words": word_rows(words),
    }


def _rate(model: Soundwave) -> float:
    encoder: Any = model.encoder
    return encoder.frame_rate / model.config.alignment.stack_frames


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.float().tolist()]
