"""Word times by CTC forced alignment: any text against the CTC head's frames.

The CTC head shares the LLM's vocabulary, so the LLM's answer, the CTC head's own transcript and a given
transcript are aligned alike. A text is spelled as the CTC targets were (`data.ctc_text`), but its words keep
the spelling that they have in the text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.spelling import Spelling, spell
from model import ops
from model.batch import Batch
from model.features import SAMPLE_RATE
from model.waveforms import SoundWarning

if TYPE_CHECKING:
    from model.soundwave import Soundwave

#: The calibrated offset for CTC's peaks, in seconds: a word starts this much before the first frame that
#: emits it, and ends this much after the last one (at the latest where the next word starts). Medians over
#: the quick start's validation dialogues, frames of 80 ms (benchmarks/timestamps.py --calibrate).
START_DELAY = 0.02
END_ADVANCE = 0.30
NO_AUDIO = "it has no audio"
#: Seconds of audio, padding included, that are encoded at a time.
BATCH_SECONDS = 120.0


@dataclass(frozen=True)
class Word:
    """A word of a text; start and end in seconds from the clip's start. confidence: the geometric mean of the
    probabilities of its CTC targets, each at its best frame; 0 where the word has no targets."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Aligned:
    words: list[Word]
    score: float  # log-probability of the best path, per frame
    problem: str | None = None  # why the text could not be aligned: its words are spread over the clip


def word_times(
    model: Soundwave,
    waveforms: Sequence[Tensor] | Batch,
    texts: Sequence[str],
    langs: Sequence[str | None] | None = None,
) -> list[list[Word]]:
    """Return the words of each text with their times in its waveform.

    waveforms: [S] each at 16 kHz (`model.waveforms.mono`), or a batch. langs: decide what a word is
    (`core.spelling.word_spans`). A text without words has no times. Where a text cannot be aligned (more
    targets than frames), its words are spread evenly over the clip with confidence 0, and a SoundWarning
    names the clip and the reason. Errors: ValueError.
    """
    alignments = align(model, waveforms, texts, langs)
    for number, aligned in enumerate(alignments):
        if aligned.problem and aligned.words:
            warnings.warn(
                f"waveform {number} has no word times: {aligned.problem}", SoundWarning, stacklevel=2
            )
    return [aligned.words for aligned in alignments]


def align(
    model: Soundwave,
    waveforms: Sequence[Tensor] | Batch,
    texts: Sequence[str],
    langs: Sequence[str | None] | None = None,
) -> list[Aligned]:
    """`word_times`, with each path's score and the reason where there is none."""
    if isinstance(waveforms, Batch):
        waveforms = [
            row[:size] for row, size in zip(waveforms.sounds, waveforms.audio_lengths.tolist(), strict=False)
        ]
    langs = [None] * len(texts) if langs is None else langs
    if not len(waveforms) == len(texts) == len(langs):
        raise ValueError(
            f"{len(waveforms)} waveforms, {len(texts)} texts and {len(langs)} languages: give one of each "
            f"for every clip"
        )
    longest = model.config.encoder.max_seconds
    for number, waveform in enumerate(waveforms):
        if len(waveform) > longest * SAMPLE_RATE:
            raise ValueError(
                f"waveform {number} lasts {len(waveform) / SAMPLE_RATE:.1f} s, this model takes "
                f"{longest:g} s at most (model.encoder.max_seconds): cut it"
            )
    alignments: list[Aligned | None] = [None] * len(texts)
    for number, waveform in enumerate(waveforms):
        if not len(waveform):
            words = spell(model.tokenizer, texts[number], model.ctc_text, langs[number]).words
            alignments[number] = Aligned(spread(words, 0.0), -math.inf, NO_AUDIO)
    for numbers in batches([len(waveform) for waveform in waveforms]):
        hidden, lengths = frames(model, [waveforms[number] for number in numbers])
        spellings = [
            spell(model.tokenizer, texts[number], model.ctc_text, langs[number]) for number in numbers
        ]
        seconds = [len(waveforms[number]) / SAMPLE_RATE for number in numbers]
        for number, aligned in zip(
            numbers, align_frames(model, hidden, lengths, spellings, seconds), strict=False
        ):
            alignments[number] = aligned
    return [aligned for aligned in alignments if aligned is not None]  # each clip is in one of the batches


def batches(samples: list[int]) -> list[list[int]]:
    """Numbers of clips that are encoded together: neighbours in length, at most BATCH_SECONDS with their
    padding. Clips without samples are left out."""
    order = sorted((n for n, size in enumerate(samples) if size), key=lambda number: samples[number])
    groups: list[list[int]] = []
    for number in order:
        if not groups or (len(groups[-1]) + 1) * samples[number] > BATCH_SECONDS * SAMPLE_RATE:
            groups.append([])
        groups[-1].append(number)
    return groups


@torch.no_grad()
def frames(model: Soundwave, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the alignment adapter's frames of waveforms [S]: hidden [A, T, D], lengths [A]."""
    if model.encoder is None:
        raise ValueError("the model was built without its encoder: it cannot encode audio")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    lengths = torch.tensor([len(waveform) for waveform in waveforms], device=device)
    padded = pad_sequence(list(waveforms), batch_first=True).to(device)
    full = model.config.alignment.ctc_length == "full"
    hidden, lengths = model.alignment(*model.encoder(padded, lengths, full, None), None)
    model.train(training)
    return hidden, lengths


def frame_seconds(model: Soundwave) -> float:
    """Return the seconds from one of the alignment adapter's frames to the next."""
    rate = model.encoder.frame_rate if model.encoder is not None else 50.0
    return model.config.alignment.stack_frames / rate


@torch.no_grad()
def align_frames(
    model: Soundwave, hidden: Tensor, lengths: Tensor, spellings: Sequence[Spelling], seconds: Sequence[float]
) -> list[Aligned]:
    """Return the word times of spelled texts in frames that the alignment adapter has made (`Audio.hidden`,
    `Audio.lengths`). seconds: of each clip."""
    targets = pad_sequence(
        [torch.tensor(spelling.ids, dtype=torch.long) for spelling in spellings], batch_first=True
    ).to(hidden.device)
    counts = torch.tensor([len(spelling.ids) for spelling in spellings], device=hidden.device)
    labels, blank = model.ctc_head.label_scores(hidden, lengths, targets)
    place, score = ops.ctc_align(labels, blank, targets, lengths, counts)
    alignments = []
    labels, place = labels.cpu(), place.cpu()
    for row, spelling in enumerate(spellings):
        length = int(lengths[row])
        if not spelling.words:
            alignments.append(Aligned([], 0.0, "it has no words"))
            continue
        problem = unalignable(spelling.ids, length)
        if problem:
            alignments.append(Aligned(spread(spelling.words, seconds[row]), -math.inf, problem))
            continue
        runs = emissions(place[row, :length], labels[row, :length], len(spelling.ids))
        words = timed(spelling, runs, frame_seconds(model), seconds[row])
        alignments.append(Aligned(words, float(score[row]) / max(length, 1)))
    return alignments


def unalignable(ids: list[int], length: int) -> str | None:
    """Return why CTC cannot spell these targets in so many frames; None where it can."""
    if not ids:
        return "nothing of its text is a CTC target (data.ctc_text drops it)"
    needed = len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))
    if needed > length:
        return f"its text needs {needed} frames, the audio has {length}: it is too long for this audio"
    return None


def spread(words: list[str], seconds: float) -> list[Word]:
    """Return words evenly spread over a clip, with confidence 0."""
    step = seconds / max(len(words), 1)
    return [Word(text, i * step, (i + 1) * step, 0.0) for i, text in enumerate(words)]


@dataclass(frozen=True)
class Run:
    """The frames that emit one target: first to last, and its largest log-probability among them."""

    first: int
    last: int
    logprob: float

    def at(self, share: float) -> float:
        """Return the place, in frames, where this share of the run has passed."""
        return self.first + share * (self.last + 1 - self.first)


def emissions(place: Tensor, labels: Tensor, count: int) -> list[Run]:
    """place [T] of `ops.ctc_align`, labels [T, U] -> the run of each of `count` targets."""
    emitting = (place >= 0).nonzero()[:, 0]
    its_place = place[emitting]
    logprob = labels[emitting, its_place]
    first = torch.full((count,), len(place)).scatter_reduce(0, its_place, emitting, "amin")
    last = torch.full((count,), -1).scatter_reduce(0, its_place, emitting, "amax")
    best = torch.full((count,), -torch.inf).scatter_reduce(0, its_place, logprob, "amax")
    return [Run(*run) for run in zip(first.tolist(), last.tolist(), best.tolist(), strict=False)]


def timed(spelling: Spelling, runs: Sequence[Run], step: float, seconds: float) -> list[Word]:
    """Return the words with times from the runs of their targets, of frames of `step` seconds. runs: of the
    first targets, where the audio ends before the text. A word without a run has no length and no confidence:
    it is at the end of the word before it."""
    times: list[tuple[float, float, float] | None] = []
    for parts in spelling.parts:
        if not parts or parts[-1].place >= len(runs):
            times.append(None)
            continue
        first, last = parts[0], parts[-1]
        start = runs[first.place].at(first.begin) * step - (START_DELAY if first.begin == 0 else 0.0)
        end = runs[last.place].at(last.end) * step + (END_ADVANCE if last.end == 1 else 0.0)
        logprob = sum(runs[part.place].logprob for part in parts) / len(parts)
        times.append((min(max(start, 0.0), seconds), min(end, seconds), min(1.0, math.exp(logprob))))
    nexts = [time[0] for time in times if time][1:] + [seconds]
    words, now = [], 0.0
    following = iter(nexts)
    for text, time in zip(spelling.words, times, strict=False):
        if time is None:
            words.append(Word(text, now, now, 0.0))
            continue
        start, end, confidence = time
        now = max(start, min(end, next(following)))
        words.append(Word(text, start, now, confidence))
    return words
