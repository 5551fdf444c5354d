"""Cut a recording with word times into clips at its pauses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from core.subtitles import TimedWord


@dataclass(frozen=True)
class Cutting:
    """Seconds. most: of a clip. least: shorter clips are joined with a neighbour where both fit into one.
    pause: a cut needs a silence of this length. margin: silence that is kept at a clip's ends."""

    most: float = 30.0
    least: float = 2.0
    pause: float = 0.2
    margin: float = 0.25


@dataclass(frozen=True)
class Clip:
    first: int  # word
    last: int  # word after the last one
    start: float
    end: float
    confidence: float  # mean over its words
    problem: str | None = None  # why it is of no use


def cut(words: Sequence[TimedWord], seconds: float, cutting: Cutting) -> list[Clip]:
    """Return clips that hold all words of a recording of `seconds`, in order, cut in the middle of pauses.

    The longest pauses are cut first, until no clip is longer than `most`; then short clips are joined again.
    A clip that is too long and has no pause has a problem.
    """
    pieces = _split(words, 0, len(words), cutting)
    pieces = _joined(words, pieces, cutting)
    clips = []
    for place, (first, last) in enumerate(pieces):
        before = words[first - 1].end if place else 0.0
        after = words[last].start if last < len(words) else seconds
        start = max(words[first].start - cutting.margin, (before + words[first].start) / 2 if place else 0.0)
        end = words[last - 1].end
        end = min(end + cutting.margin, (end + after) / 2 if last < len(words) else seconds)
        confidence = fmean(word.confidence for word in words[first:last])
        problem = None
        if _length(words, first, last) + 2 * cutting.margin > cutting.most:
            problem = f"lasts {end - start:.1f} s and has no pause of {cutting.pause:g} s"
        clips.append(Clip(first, last, start, max(end, start), confidence, problem))
    return clips


def _length(words: Sequence[TimedWord], first: int, last: int) -> float:
    return words[last - 1].end - words[first].start


def _split(words: Sequence[TimedWord], first: int, last: int, cutting: Cutting) -> list[tuple[int, int]]:
    pieces, open_pieces = [], [(first, last)] if last > first else []
    while open_pieces:
        first, last = open_pieces.pop()
        pauses = [
            (words[place].start - words[place - 1].end, -abs(2 * place - first - last), place)
            for place in range(first + 1, last)
        ]
        longest = max(pauses, default=None)
        # with its margins a clip is at most `most` long
        fits = _length(words, first, last) + 2 * cutting.margin <= cutting.most
        if fits or longest is None or longest[0] < cutting.pause:
            pieces.append((first, last))
        else:
            open_pieces += [(first, longest[2]), (longest[2], last)]
    return sorted(pieces)


def _joined(
    words: Sequence[TimedWord], pieces: list[tuple[int, int]], cutting: Cutting
) -> list[tuple[int, int]]:
    """Join each clip below `least` with the neighbour across the shorter pause, where both fit into one."""
    pieces, place = list(pieces), 0
    while place < len(pieces):
        first, last = pieces[place]
        options = []
        if _length(words, first, last) < cutting.least:
            for other in (place - 1, place):
                if 0 <= other < len(pieces) - 1:
                    begin, end = pieces[other][0], pieces[other + 1][1]
                    if _length(words, begin, end) + 2 * cutting.margin <= cutting.most:
                        gap = words[pieces[other + 1][0]].start - words[pieces[other][1] - 1].end
                        options.append((gap, other))
        if not options:
            place += 1
            continue
        other = min(options)[1]
        pieces[other : other + 2] = [(pieces[other][0], pieces[other + 1][1])]
        place = max(other - 1, 0)
    return pieces
