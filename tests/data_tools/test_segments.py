"""Recordings are cut at their pauses."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.segments import Cutting, cut


@dataclass(frozen=True)
class Word:
    start: float
    end: float
    confidence: float = 0.5
    text: str = "a"


def words_of(*times: tuple[float, float]) -> list[Word]:
    return [Word(start, end) for start, end in times]


def test_the_longest_pauses_are_cut():
    words = words_of((0.5, 1), (1.3, 4), (6, 9), (9.1, 10))
    clips = cut(words, 12.0, Cutting(most=6, least=0.1, pause=0.2, margin=0.5))
    assert [(clip.first, clip.last) for clip in clips] == [(0, 2), (2, 4)]
    assert [(clip.start, clip.end) for clip in clips] == [(0.0, 4.5), (5.5, 10.5)]
    assert [clip.problem for clip in clips] == [None, None]


def test_a_cut_is_in_the_middle_of_a_short_pause():
    clips = cut(words_of((0, 4), (4.3, 9)), 9.0, Cutting(most=6, least=0.1, pause=0.2, margin=0.5))
    assert [(clip.start, clip.end) for clip in clips] == [(0.0, 4.15), (4.15, 9.0)]


def test_short_clips_are_joined_across_the_shorter_pause():
    words = words_of((0, 5), (5.5, 6), (7, 11))
    clips = cut(words, 11.0, Cutting(most=7, least=2, pause=0.2, margin=0.1))
    assert [(clip.first, clip.last) for clip in clips] == [(0, 2), (2, 3)]


def test_speech_without_a_pause_is_named():
    words = words_of((0, 5), (5.1, 10), (12, 13))
    clips = cut(words, 13.0, Cutting(most=8, least=0.1, pause=0.2, margin=0.1))
    assert [clip.problem for clip in clips] == ["lasts 10.1 s and has no pause of 0.2 s", None]


def test_no_words_are_no_clips():
    assert cut([], 5.0, Cutting()) == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 3000)), max_size=40), st.integers(3, 20))
def test_clips_hold_every_word_and_fit(times, most):
    words, now = [], 0.0
    for gap, length in times:
        start = now + gap / 1000
        now = start + length / 1000
        words.append(Word(start, now))
    cutting = Cutting(most=most, least=1.0)
    seconds = now + 1.0
    clips = cut(words, seconds, cutting)
    assert [n for clip in clips for n in range(clip.first, clip.last)] == list(range(len(words)))
    for before, after in zip(clips, clips[1:]):
        assert before.end <= after.start + 1e-9
    for clip in clips:
        assert 0 <= clip.start <= words[clip.first].start
        assert words[clip.last - 1].end <= clip.end <= seconds + 1e-9
        if clip.problem is None:
            assert clip.end - clip.start <= most + 1e-9
        else:  # nothing could be cut
            inside = words[clip.first : clip.last]
            assert all(b.start - a.end < cutting.pause for a, b in zip(inside, inside[1:]))
