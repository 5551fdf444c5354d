"""Cut recordings of any length into windows that a model takes at once, in constant memory.

    samples -> scan by the CTC head, chunk after chunk -> the longest pause of each window's reach -> windows

A window ends in the middle of a blank frame: of the longest run of blanks before its last allowed frame
that no word continues after, at the run's quietest frame. Every sample is in the body of exactly one
window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from core.audio import SAMPLE_RATE

CONTEXT_SECONDS = 1.0  # of audio on both sides that a scanned chunk sees and whose frames are not used
LOOKAHEAD_SECONDS = 1.0  # behind a window's longest length that is looked at: what follows its last pause
SHORTEST_SHARE = 0.4  # of a window's longest length: no cut is looked for before it, but at a long pause
SHORTEST_SECONDS = 0.5  # of a window that ends in a long pause
MARGIN_SECONDS = 0.5  # of a long pause that stay with the words at its ends


@dataclass(frozen=True)
class Frames:
    """The CTC head's output for the frames of a chunk: is each blank, and does its token begin a word."""

    blank: np.ndarray  # [T] bool
    begins_word: np.ndarray  # [T] bool
    outputs: tuple[torch.Tensor, ...] = ()  # [T, ...] each; a window gets those of its frames


#: Chunks [S] of equal or lower lengths -> their frames, one for each started `frame` samples.
Scan = Callable[[list[np.ndarray]], list[Frames]]


@dataclass(frozen=True)
class Window:
    """A stretch of a recording. samples [S] begin at `start` and hold the body [body_start, body_end),
    with an overlap on both sides; all in samples of the recording at 16 kHz. outputs: the scan's, of the
    frames that begin within `samples`, the first one at `frames_start`; empty where not all was scanned."""

    start: int
    samples: np.ndarray
    body_start: int
    body_end: int
    frames_start: int = 0
    outputs: tuple[torch.Tensor, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def frames_origin(self) -> int:
        """The sample of the recording at which the window's first frame begins."""
        return self.frames_start if self.outputs else self.start

    @property
    def frames_seconds(self) -> float:
        """The seconds from the first frame to the window's end."""
        return (self.start + len(self.samples) - self.frames_origin) / SAMPLE_RATE


def blank_runs(blank: np.ndarray) -> list[tuple[int, int]]:
    """Return (begin, end) of each run of blanks [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], blank, [False]]).astype(np.int8)))
    return [(begin, end) for begin, end in edges.reshape(-1, 2).tolist()]


def quietest(energy: np.ndarray, begin: int, last: int) -> int:
    """Return the quietest of the frames [begin, last], of equal ones the middle one."""
    quiet = energy[begin : last + 1]
    lowest = np.flatnonzero(quiet <= quiet.min() * (1 + 1e-6))
    return begin + int(lowest[len(lowest) // 2])


def pause_cut(
    blank: np.ndarray,
    begins_word: np.ndarray,
    energy: np.ndarray,
    start: int,
    first: int,
    last: int,
    pause: int,
    margin: int,
) -> int | None:
    """Return the frame in [first, last] in whose middle to cut the first pause of at least `pause`
    frames; None where there is none.

    The cut is near the words before the pause, at most `margin` frames behind them. A window that has no
    words yet, from frame `start` on, ends near those after the pause.
    """
    for begin, end in blank_runs(blank):
        if end - begin < pause or (end < len(blank) and not begins_word[end]):
            continue
        if begin <= start:
            low = high = min(end - 1 - min(margin, (end - begin) // 2), last)
        else:
            low, high = max(begin + 1, first), min(end - 2, begin + margin, last)
        if first <= low <= high:
            return quietest(energy, low, high)
    return None


def best_cut(blank: np.ndarray, begins_word: np.ndarray, energy: np.ndarray, first: int, last: int) -> int:
    """Return the frame in [first, last] in whose middle to cut.

    blank, begins_word [T]: of the window's frames and as many behind `last` as are known; energy [T]. Of
    the runs of blanks that reach into the range the longest one is taken, of equal ones the last; runs
    inside a word only where there are no others. Where nothing is blank: the quietest frame.
    """
    best: tuple[bool, int, int] | None = None
    place = None
    for begin, end in blank_runs(blank):
        if end <= first or begin > last:
            continue
        between_words = end >= len(blank) or bool(begins_word[end])
        rank = between_words, end - begin, begin
        if best is None or rank > best:
            best, place = rank, (max(begin, first), min(end - 1, last))
    begin, end = (first, last) if place is None else place
    if place is not None and end - begin >= 2:
        begin, end = begin + 1, end - 1  # away from the words at its ends
    return quietest(energy, begin, end)


class Cutter:
    """Cuts one channel. `push` its samples, then `finish`; each returns the windows that are complete.

    frame: samples of one frame of `scan`. longest: of a window's body. overlap: on both sides of it.
    pause: that ends a window; 0: none does. All in samples. scan_samples: how many a call of `scan` may
    take together. chunk: samples of one chunk, context included (default: a window and its context).
    """

    def __init__(
        self,
        scan: Scan,
        frame: int,
        longest: int,
        overlap: int = 0,
        pause: int = 0,
        scan_samples: int = 0,
        chunk: int | None = None,
    ):
        self._scan, self._frame, self._overlap = scan, frame, overlap
        self._longest = max(longest, 4 * frame)
        self._pause = max(3, round(pause / frame)) if pause else 0  # frames; 0: no cut at pauses
        self._context = -(-round(CONTEXT_SECONDS * SAMPLE_RATE) // frame) * frame
        self._chunk = -(-self._longest // frame) * frame
        if chunk is not None:
            self._context = min(self._context, chunk // 4 // frame * frame)
            self._chunk = max(frame, (chunk - 2 * self._context) // frame * frame)
        self._lookahead = round(LOOKAHEAD_SECONDS * SAMPLE_RATE)
        self._most = max(1, scan_samples // (self._chunk + 2 * self._context))  # chunks of one call
        self._samples = np.zeros(0, np.float32)  # of the recording, from `_base` on
        self._base = 0
        self._start = 0  # of the window that comes next
        self._first = 0  # frame of the recording that the arrays below begin with
        self._blank = self._begins = np.zeros(0, bool)
        self._energy = np.zeros(0)
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._outputs_first = 0  # frame of the recording that they begin with

    def push(self, samples: np.ndarray) -> list[Window]:
        """Take samples [S] float32 that follow those before."""
        self._samples = np.concatenate([self._samples, samples])
        return self._cut(final=False)

    def finish(self) -> list[Window]:
        """Cut what is left; no samples follow."""
        windows = self._cut(final=True)
        if (end := self._end) > self._start:
            windows.append(self._window(end))
        return windows

    @property
    def _end(self) -> int:
        return self._base + len(self._samples)

    @property
    def _scanned(self) -> int:
        """Samples that were scanned."""
        return (self._first + len(self._blank)) * self._frame

    def _cut(self, final: bool) -> list[Window]:
        windows: list[Window] = []
        while self._end - self._start > self._longest:
            reach = self._start + self._longest + max(self._overlap, self._lookahead)
            if self._scanned < min(reach, self._end) and not self._scan_more(final):
                break
            if self._scanned < reach and self._scanned < self._end:
                continue
            if not final and self._end < reach:
                break
            windows.append(self._window(self._next_cut()))
        if final and len(self._blank) and self._pause:  # of a recording that was scanned: what is left
            while self._scanned < self._end:
                self._scan_more(final)
            while (cut := self._pause_cut(len(self._blank) - 1, *self._all())) is not None:
                windows.append(self._window(cut))
        return windows

    def _scan_more(self, final: bool) -> bool:
        """Scan the chunks that are there; whether there were any."""
        chunks: list[np.ndarray] = []
        sizes, begin = [], self._scanned
        while len(chunks) < self._most and begin < self._end:
            end = begin + self._chunk
            if not final and self._end < end + self._context:
                break
            end = min(end, self._end)
            seen = max(0, begin - self._context)
            chunks.append(self._slice(seen, min(self._end, end + self._context)))
            sizes.append(((begin - seen) // self._frame, -(-(end - begin) // self._frame)))
            begin = end
        for chunk, (skip, count), frames in zip(
            chunks, sizes, self._scan(chunks) if chunks else [], strict=False
        ):
            blank, begins = np.ones(count, bool), np.ones(count, bool)  # frames that an encoder leaves out
            blank_frames = frames.blank[skip : skip + count]
            blank[: len(blank_frames)] = blank_frames
            begins[: len(blank_frames)] = frames.begins_word[skip : skip + count]
            body = chunk[skip * self._frame : (skip + count) * self._frame]
            padded = np.pad(body, (0, count * self._frame - len(body)))
            self._blank = np.concatenate([self._blank, blank])
            self._begins = np.concatenate([self._begins, begins])
            self._energy = np.concatenate([self._energy, np.square(padded).reshape(count, -1).mean(1)])
            self._keep_outputs(frames.outputs, skip, count)
        return bool(chunks)

    def _keep_outputs(self, outputs: tuple[torch.Tensor, ...], skip: int, count: int) -> None:
        """Append a chunk's outputs of its frames [skip, skip + count); the last one again for frames that an
        encoder leaves out at a recording's end."""
        parts = []
        for output in outputs:
            part = output[skip : skip + count]
            missing = output[-1:].expand(count - len(part), *output.shape[1:])
            parts.append(torch.cat([part, missing]))
        if self._outputs:
            parts = [torch.cat(both) for both in zip(self._outputs, parts, strict=True)]
        self._outputs = tuple(parts)

    def _next_cut(self) -> int:
        """The sample where the next window's body ends."""
        half = self._frame // 2
        last = (self._start + self._longest - half) // self._frame - self._first
        if self._pause and (cut := self._pause_cut(last, *self._cut_frames())) is not None:
            return cut
        first = -(-(self._start + round(SHORTEST_SHARE * self._longest)) // self._frame) - self._first
        last = min(last, len(self._blank) - 1)
        frame = best_cut(*self._cut_frames(), min(first, last), last)
        return (self._first + frame) * self._frame + half

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is known about frames."""
        return self._blank, self._begins, self._energy

    def _cut_frames(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is known about the frames that a cut depends on, however many were scanned."""
        end = -(-(self._start + self._longest + self._lookahead) // self._frame) - self._first
        return self._blank[:end], self._begins[:end], self._energy[:end]

    def _pause_cut(self, last: int, blank: np.ndarray, begins: np.ndarray, energy: np.ndarray) -> int | None:
        """The sample in the first long pause, not behind frame `last`."""
        half, seconds = self._frame // 2, SAMPLE_RATE / self._frame
        start = -(-self._start // self._frame) - self._first
        first = start + max(1, round(SHORTEST_SECONDS * seconds))
        margin = max(1, round(MARGIN_SECONDS * seconds))
        last = min(last, len(blank) - 1, (self._end - 1 - half) // self._frame - self._first)
        frame = pause_cut(blank, begins, energy, start, first, last, self._pause, margin)
        return None if frame is None else (self._first + frame) * self._frame + half

    def _window(self, end: int) -> Window:
        """The window from the last one's end to `end`; what no later one needs is dropped."""
        begin, stop = max(0, self._start - self._overlap), min(self._end, end + self._overlap)
        first, last = -(-begin // self._frame), -(-stop // self._frame)
        outputs: tuple[torch.Tensor, ...] = ()
        if first < last and stop <= self._scanned:
            own = slice(first - self._outputs_first, last - self._outputs_first)
            outputs = tuple(output[own].clone() for output in self._outputs)
        window = Window(begin, self._slice(begin, stop), self._start, end, first * self._frame, outputs)
        self._start = end
        needed = max(self._outputs_first, (end - self._overlap) // self._frame)
        self._outputs = tuple(output[needed - self._outputs_first :] for output in self._outputs)
        self._outputs_first = needed
        drop = max(0, end // self._frame - self._first)
        self._first += drop
        self._blank, self._begins = self._blank[drop:], self._begins[drop:]
        self._energy = self._energy[drop:]
        keep = max(self._base, min(end - self._overlap, self._scanned - self._context))
        self._samples, self._base = self._samples[keep - self._base :].copy(), keep
        return window

    def _slice(self, begin: int, end: int) -> np.ndarray:
        return self._samples[begin - self._base : end - self._base].copy()
