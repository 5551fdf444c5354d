"""Align recordings of any length with their transcripts: windows for the encoder, sections for the path.

The encoder and the alignment adapter get windows with context on both sides, whose middle is kept. The path
is searched in sections of some minutes, against the text that may be spoken there, with an open end. Each
section is cut at the longest pause of its second half, and the next section starts there. Memory: the frames
of the whole recording (D numbers each), and the path of one section.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.spelling import spell
from model import ops
from model.features import SAMPLE_RATE
from model.generation.timestamps import (
    BATCH_SECONDS,
    NO_AUDIO,
    Aligned,
    Run,
    emissions,
    frame_seconds,
    frames,
    spread,
    timed,
)
from model.soundwave import Soundwave

#: Seconds of a window, and of its context on either side; of a section.
WINDOW, CONTEXT, SECTION = 30.0, 2.0, 240.0
#: CTC targets that a section may hold for each of its seconds; fast speech has about 8.
TARGETS_PER_SECOND = 25


def align_recording(
    model: Soundwave, waveform: Tensor, text: str, lang: str | None = None, *, section: float = SECTION
) -> Aligned:
    """Return the words of a transcript with their times in a recording [S] at 16 kHz of any length.

    Words that come after the recording's end have no length and confidence 0, and `problem` counts them.
    """
    spelling = spell(model.tokenizer, text, model.ctc_text, lang)
    seconds, step = len(waveform) / SAMPLE_RATE, frame_seconds(model)
    if not spelling.words:
        return Aligned([], 0.0, "it has no words")
    if not len(waveform):
        return Aligned(spread(spelling.words, 0.0), -math.inf, NO_AUDIO)
    if not spelling.ids:
        return Aligned(
            spread(spelling.words, seconds),
            -math.inf,
            "nothing of its text is a CTC target (data.ctc_text)",
        )
    hidden = recording_frames(model, waveform)
    begins = {parts[0].place for parts in spelling.parts if parts and parts[0].begin == 0}
    runs: list[Run] = []
    total, frame, size = 0.0, 0, max(1, round(section / step))
    while len(runs) < len(spelling.ids) and frame < len(hidden):
        last = frame + size >= len(hidden)
        part = hidden[frame : frame + size]
        rest = spelling.ids[len(runs) :]
        limit = len(part) if last else min(len(part), round(TARGETS_PER_SECOND * section))
        # at the recording's end the text ends, too, unless it cannot be spelled in what is left
        open_end = not last or len(rest) + sum(a == b for a, b in zip(rest, rest[1:], strict=False)) > len(
            part
        )
        path, scores = _path(model, part, rest[:limit], open_end)
        if not path:
            break
        if last:
            cut, kept = len(part), len(path)
        else:
            cut, kept = _pause(path, len(runs), begins, len(part))
        runs += [Run(run.first + frame, run.last + frame, run.logprob) for run in path[:kept]]
        total += float(scores[:cut].sum())
        frame += cut
    words = timed(spelling, runs, step, seconds)
    left = sum(not parts or parts[-1].place >= len(runs) for parts in spelling.parts) if runs else len(words)
    problem = None
    if len(runs) < len(spelling.ids):
        problem = f"the audio ends before {left} of its {len(words)} words"
    return Aligned(words, total / max(len(hidden), 1), problem)


@torch.no_grad()
def recording_frames(model: Soundwave, waveform: Tensor) -> Tensor:
    """Return the alignment adapter's frames [T, D] of a recording [S] of any length."""
    step = round(frame_seconds(model) * SAMPLE_RATE)
    longest = min(WINDOW, model.config.encoder.max_seconds, model.trained_seconds or WINDOW)
    context = int(min(CONTEXT, longest / 4) * SAMPLE_RATE) // step * step
    middle = max(step, int(longest * SAMPLE_RATE) // step * step - 2 * context)
    kept: list[Tensor] = []
    group: list[tuple[Tensor, int, int]] = []  # waveform of a window; its first frame that is kept; how many

    def encode() -> None:
        hidden, _ = frames(model, [window for window, _, _ in group])
        kept.extend(row[first : first + count] for row, (_, first, count) in zip(hidden, group, strict=False))
        group.clear()

    for begin in range(0, len(waveform), middle):
        end = min(begin + middle, len(waveform))
        before, after = max(begin - context, 0), min(end + context, len(waveform))
        group.append((waveform[before:after], (begin - before) // step, -(-(end - begin) // step)))
        if (len(group) + 1) * longest > BATCH_SECONDS:
            encode()
    if group:
        encode()
    return torch.cat(kept)


def _path(model: Soundwave, hidden: Tensor, ids: list[int], open_end: bool) -> tuple[list[Run], Tensor]:
    """The runs of the targets that the best path emits, and the path's log-probability at each frame [T]."""
    targets = torch.tensor([ids], device=hidden.device)
    lengths = torch.tensor([len(hidden)], device=hidden.device)
    labels, blank = model.ctc_head.label_scores(hidden[None], lengths, targets)
    counts = torch.tensor([len(ids)], device=hidden.device)
    place, _ = ops.ctc_align(labels, blank, targets, lengths, counts, open_end=open_end)
    place, labels, blank = place[0].cpu(), labels[0].cpu(), blank[0].cpu()
    runs = emissions(place, labels, int(place.max()) + 1)
    scores = torch.where(place >= 0, labels.gather(1, place.clamp(min=0)[:, None])[:, 0], blank)
    return runs, scores


def _pause(runs: list[Run], offset: int, begins: set[int], length: int) -> tuple[int, int]:
    """Where to cut a section: (frame, targets before it), in the middle of the longest pause before a word of
    its second half. offset: targets before the section. Without such a word all is kept."""
    pauses = [
        (runs[number].first - runs[number - 1].last, -number)
        for number in range(1, len(runs))
        if offset + number in begins and runs[number].first >= length // 2
    ]
    if not pauses:
        return max(runs[-1].last + 1, length // 2), len(runs)
    number = -max(pauses)[1]
    return (runs[number - 1].last + 1 + runs[number].first) // 2, number
