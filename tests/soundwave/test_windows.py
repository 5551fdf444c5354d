"""Windows of long recordings: no sample lost or doubled, cuts in pauses, the same for any size of blocks."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from soundwave.windows import Cutter, Frames, best_cut, pause_cut

FRAME = 10


class Head:
    """A CTC head that knows the recording by its samples: each frame's samples hold its number in `truth`."""

    def __init__(self, blank: np.ndarray, begins: np.ndarray):
        self.blank, self.begins = blank, begins
        self.calls: list[list[int]] = []

    def __call__(self, chunks: list[np.ndarray]) -> list[Frames]:
        self.calls.append([len(chunk) for chunk in chunks])
        found = []
        for chunk in chunks:
            numbers = chunk[::FRAME].astype(int) // FRAME
            kept = numbers[: max(1, len(numbers) - 1)]  # an encoder that leaves out the last frame
            outputs = (torch.from_numpy(kept), torch.from_numpy(kept).float()[:, None])
            found.append(Frames(self.blank[kept], self.begins[kept], outputs))
        return found


def cut(head: Head, samples: np.ndarray, blocks: list[int], **options) -> list:
    cutter, windows, place = Cutter(head, FRAME, **options), [], 0
    for size in blocks:
        windows += cutter.push(samples[place : place + size])
        place += size
    return windows + cutter.push(samples[place:]) + cutter.finish()


recordings = st.integers(1, 3000).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(0, 2**32 - 1),
        st.floats(0, 1),
        st.lists(st.integers(0, 900), max_size=6),
        st.integers(5, 60),
        st.integers(0, 70),
        st.integers(0, 9),
        st.integers(0, 3000),
        st.none() | st.integers(4 * FRAME, 600),
    )
)


@given(recordings)
@example((476, 7, 0.5, [], 5, 0, 0, 0, None))  # a cut in the recording's last frame
@settings(max_examples=120, deadline=None)
def test_windows_hold_each_sample_once_and_end_in_pauses(drawn):
    size, seed, share, blocks, longest, overlap, pause, together, chunk = drawn
    random = np.random.default_rng(seed)
    frames = size // FRAME + 1
    blank, begins = random.random(frames) < share, random.random(frames) < 0.5
    blank[frames // 3 : frames // 2] |= seed % 2 == 0  # a long silence
    samples = np.arange(size, dtype=np.float32)
    options = dict(longest=longest * FRAME, overlap=overlap, pause=pause * FRAME, scan_samples=together)
    head = Head(blank, begins)
    with (
        patch("soundwave.windows.CONTEXT_SECONDS", 60 / 16000),
        patch("soundwave.windows.LOOKAHEAD_SECONDS", 90 / 16000),
        patch("soundwave.windows.SHORTEST_SECONDS", 40 / 16000),
        patch("soundwave.windows.MARGIN_SECONDS", 50 / 16000),
    ):
        windows = cut(head, samples, blocks, chunk=chunk, **options)
        again = cut(Head(blank, begins), samples, [], **options | {"scan_samples": 0})

    assert windows[0].body_start == 0 and windows[-1].body_end == size
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.body_end == after.body_start
    for window in windows:
        assert 0 < window.body_end - window.body_start <= longest * FRAME
        low, high = max(0, window.body_start - overlap), min(size, window.body_end + overlap)
        assert window.start == low and np.array_equal(window.samples, samples[low:high])
    seen = blank.copy()
    seen[-(-size // FRAME) - 1 :] = (
        True  # the recording's last frame, which the head leaves out, counts as blank
    )
    for window in windows[:-1]:
        first = -(-(window.body_start + round(0.4 * longest * FRAME)) // FRAME)
        last = (window.body_start + longest * FRAME - FRAME // 2) // FRAME
        assert seen[window.body_end // FRAME] or not seen[first : last + 1].any()
    assert [(w.body_start, w.body_end) for w in again] == [(w.body_start, w.body_end) for w in windows]
    if chunk is not None:
        assert max((length for call in head.calls for length in call), default=0) <= chunk
    for window in windows:
        stop = window.start + len(window.samples)
        begun = np.arange(-(-window.start // FRAME), -(-stop // FRAME))  # frames that begin in it
        if window.outputs:
            assert window.frames_origin == begun[0] * FRAME
            last = min(len(begun), -(-size // FRAME) - 1 - begun[0])  # the recording's last one is left out
            for output in window.outputs:
                assert len(output) == len(begun) and output.flatten()[:last].tolist() == begun[:last].tolist()
        else:
            assert window.frames_origin == window.start


def frames(text: str) -> tuple[np.ndarray, np.ndarray]:
    """`.` a blank, `W` a token that begins a word, `w` one that continues it."""
    return np.array([c == "." for c in text]), np.array([c == "W" for c in text])


def test_the_longest_pause_between_words_is_cut():
    for text, first, last, wanted in (
        ("WwW..W...W.Ww", 2, 12, {7}),  # the longest of three, in its middle
        ("Ww....wW..Ww", 2, 11, {8, 9}),  # a longer one is inside a word
        ("Ww..w..w", 2, 7, {5, 6, 2, 3}),  # all are
        ("WwwwwwwWwww", 4, 9, set(range(4, 10))),  # none
        ("W...W......", 2, 7, {5, 6, 7}),  # it continues after the last frame
    ):
        blank, begins = frames(text)
        assert best_cut(blank, begins, np.ones(len(text)), first, last) in wanted, text


def test_the_first_long_pause_is_cut_near_the_words_before_it():
    for text, start, wanted in (
        ("WwW....W......Ww", 0, {4, 5}),  # the first of two
        ("Ww....w....Ww", 0, {8, 9}),  # the first is inside a word
        ("Ww..W..Ww", 0, {None}),  # both are short
        ("W...........W", 0, {2, 3}),  # not far behind its words
        ("..........Www", 0, {7}),  # no words yet: near those that follow
        ("W.....", 0, {2, 3}),  # nothing follows
    ):
        blank, begins = frames(text)
        cut = pause_cut(blank, begins, np.ones(len(text)), start, 1, len(text) - 1, pause=4, margin=2)
        assert cut in wanted, (text, cut)


def test_of_a_pause_the_quietest_frame_is_cut():
    blank, begins = frames("W........W")
    energy = np.array([9, 3, 3, 3, 3, 3, 0.5, 3, 3, 9.0])
    assert best_cut(blank, begins, energy, 1, 9) == 6


def test_a_recording_that_fits_is_not_scanned():
    head = Head(np.ones(9, bool), np.ones(9, bool))
    (window,) = cut(head, np.arange(80, dtype=np.float32), [30], longest=100)
    assert (window.body_start, window.body_end) == (0, 80) and not head.calls


def test_memory_holds_a_few_windows_whatever_the_length():
    random = np.random.default_rng(0)
    cutter = Cutter(
        lambda chunks: [
            Frames(random.random(len(c) // FRAME + 1) < 0.5, np.ones(len(c) // FRAME + 1, bool))
            for c in chunks
        ],
        FRAME,
        400,
        50,
        3000,
    )
    held = 0
    for _ in range(400):
        cutter.push(np.zeros(1000, np.float32))
        held = max(held, len(cutter._samples))
    assert held < 4 * 16000 + 3000  # the context on both sides is a second each
