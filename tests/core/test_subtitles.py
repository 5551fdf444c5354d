"""Subtitle files, read back by independent parsers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import unescape
from io import StringIO

import pysubs2
import pytest
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st
from praatio import textgrid

from core.subtitles import FORMATS, Segment, cues, write


@dataclass(frozen=True)
class Word:
    text: str
    start: float
    end: float
    confidence: float = 0.5


HOSTILE = [
    "Hello,",
    "<b>&amp;</b>",
    "-->",
    'say "hi"',
    "1",
    "R & B",
    "你",
    "好，",
    "{\\an8}",
    ";;",
    "WEBVTT",
    "NOTE",
    "<v",
    'Lee,\n"Ann"',
    "\n",
    "a\r\n\r\n2\r\nb",
    "x\u2028y\x85z",
]


def one_line(text: str) -> str:
    return " ".join(text.split())


@st.composite
def word_lists(draw) -> list[Word]:
    words, now = [], 0.0
    for text in draw(st.lists(st.sampled_from(HOSTILE), max_size=12)):
        start = now + draw(st.integers(0, 2500)) / 1000
        now = start + draw(st.integers(0, 900)) / 1000
        words.append(Word(text, start, now, draw(st.floats(0, 1))))
    return words


def shown(segments: list[Segment]) -> list[tuple[int, int, str]]:
    """(begin, end, text) of each segment with text, in milliseconds; a cue lasts 1 ms at least."""
    return [
        (round(s.begins * 1000), max(round(s.ends * 1000), round((s.begins + 0.001) * 1000)), s.line)
        for s in segments
        if s.line
    ]


@settings(max_examples=60, deadline=None)
@given(word_lists())
def test_srt_is_read_back(words):
    segments = cues(words)
    read = pysubs2.SSAFile.from_string(write(segments, "srt"), format_="srt", keep_unknown_html_tags=True)
    wanted = shown(segments)
    assert [(event.start, event.end) for event in read] == [times[:2] for times in wanted]
    plain = [text.replace("-->", "->") for *_, text in wanted]
    written = [block.split("\n", 2)[2] for block in write(segments, "srt").split("\n\n") if block]
    assert written == plain


@settings(max_examples=60, deadline=None)
@given(word_lists())
def test_webvtt_is_read_back(words):
    segments = cues(words)
    read = list(webvtt.from_string(write(segments, "vtt")))
    wanted = shown(segments)
    milliseconds = [
        tuple(
            time.hours * 3600000 + time.minutes * 60000 + time.seconds * 1000 + time.milliseconds
            for time in (c.start_time, c.end_time)
        )
        for c in read
    ]
    assert milliseconds == [times[:2] for times in wanted]
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
    texts = [re.sub("&lt;|&gt;|&amp;", lambda m: unescape[m[0]], c.raw_text) for c in read]
    assert texts == [text for *_, text in wanted]


@settings(max_examples=60, deadline=None)
@given(word_lists(), st.floats(0, 40))
def test_textgrid_is_read_back(tmp_path_factory, words, seconds):
    path = tmp_path_factory.getbasetemp() / "words.TextGrid"
    path.write_text(write(cues(words), "TextGrid", seconds=seconds), encoding="utf-8")
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="error")
    end = max(seconds, *(word.end for word in words), 0.001) if words else max(seconds, 0.001)
    assert grid.maxTimestamp == pytest.approx(end, abs=1e-5)
    for name in ("words", "segments"):
        entries = grid.getTier(name).entries
        assert entries[0].start == 0 and entries[-1].end == pytest.approx(end, abs=1e-5)
        assert all(a.end == b.start for a, b in zip(entries, entries[1:], strict=False))
    said = " ".join(entry.label for entry in grid.getTier("words").entries if entry.label)
    if all(word.end - word.start > 0.001 for word in words):
        spoken = [word for word in words if one_line(word.text)]
        assert said == " ".join(one_line(word.text) for word in spoken)
        found = [(entry.start, entry.end) for entry in grid.getTier("words").entries if entry.label]
        assert found == [pytest.approx((word.start, word.end), abs=1e-5) for word in spoken]


# NIST's format: file, channel, begin, duration, word, confidence; ";;" begins a comment
CTM = re.compile(r"(\S+) (\S+) (\d+\.\d+) (\d+\.\d+) (\S+) ([01]\.\d+)")


def test_ctm_has_a_word_a_line():
    words = [Word("Hello —", 0.5, 0.75, 1.0), Word("...", 0.8, 0.9), Word("R & B", 1.0, 1.5, 0.25)]
    other = Segment([Word("ja", 0.1, 0.2)], speaker="right")
    lines = write([*cues(words, speaker="left"), other], "ctm", name="my file").splitlines()
    assert [CTM.fullmatch(line).groups() for line in lines] == [
        ("my_file", "1", "0.500", "0.250", "Hello", "1.000"),
        ("my_file", "1", "1.000", "0.500", "R_B", "0.250"),
        ("my_file", "2", "0.100", "0.100", "ja", "0.500"),
    ]
    assert write([Segment([Word("a", 0, 1)])], "ctm", name=";;x").startswith("x ")


@settings(max_examples=60, deadline=None)
@given(word_lists(), st.sampled_from(["plain", "a b", 'Lee, "Ann"', "two\nlines", ";;", "\n", ""]))
def test_ctm_has_six_columns_whatever_names_and_words_hold(words, name):
    lines = write(cues(words), "ctm", name=name).split("\n")
    assert lines.pop() == ""
    spoken = [word for word in words if any(c.isalnum() for c in word.text)]
    rows = [CTM.fullmatch(line).groups() for line in lines]
    assert [(row[2], row[3]) for row in rows] == [
        (f"{word.start:.3f}", f"{word.end - word.start:.3f}") for word in spoken
    ]
    assert len({row[0] for row in rows}) <= 1


@pytest.mark.parametrize("speaker", ['Lee, "Ann"', "two\nlines", "<b> & co", "a -> b --> c"])
def test_speakers_of_any_name_are_read_back(speaker, tmp_path):
    segments = [Segment([Word("Hi", 0.0, 1.0)], speaker=speaker)]
    (cue,) = webvtt.from_string(write(segments, "vtt"))
    (event,) = pysubs2.SSAFile.from_string(write(segments, "srt"), format_="srt")
    plain = one_line(speaker)
    assert unescape(cue.voice) == plain and cue.text == "Hi"
    assert (event.start, event.end) == (0, 1000) and event.plaintext.endswith(": Hi")
    assert json.loads(write(segments, "json"))["segments"][0]["speaker"] == speaker
    path = tmp_path / "speaker.TextGrid"
    path.write_text(write(segments, "TextGrid"), encoding="utf-8")
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="error")
    assert grid.tierNames == (f"words {plain}", f"segments {plain}")


def test_json_holds_segments_and_words():
    segment = Segment([Word("你", 0.0, 0.25), Word("好，", 0.25, 0.51239)], speaker="a")
    assert json.loads(write([segment], "json")) == {
        "segments": [
            {
                "start": 0.0,
                "end": 0.512,
                "text": "你好，",
                "speaker": "a",
                "words": [
                    {"text": "你", "start": 0.0, "end": 0.25, "confidence": 0.5},
                    {"text": "好，", "start": 0.25, "end": 0.512, "confidence": 0.5},
                ],
            }
        ]
    }


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_said_is_a_whole_file(format, tmp_path):
    text = write([], format)
    if format == "json":
        assert json.loads(text) == {"segments": []}
    elif format == "vtt":
        assert list(webvtt.from_buffer(StringIO(text))) == []
    elif format == "TextGrid":
        (tmp_path / "x.TextGrid").write_text(text)
        assert textgrid.openTextgrid(str(tmp_path / "x.TextGrid"), includeEmptyIntervals=True).tierNames
    else:
        assert text == ""


def test_speakers_are_named():
    segments = [Segment([Word("Hi", 0, 1)], speaker="A & B"), Segment([Word("Yes", 0.5, 1.5)], speaker="C")]
    assert write(segments, "srt").splitlines()[2] == "A & B: Hi"
    assert "<v A &amp; B>Hi" in write(segments, "vtt")
    assert write(segments, "TextGrid").count('class = "IntervalTier"') == 4


def test_unknown_format_is_named():
    with pytest.raises(
        ValueError, match="format 'sbv' is unknown: give one of json, srt, vtt, ctm, TextGrid"
    ):
        write([], "sbv")


def test_cues_end_at_sentences_pauses_and_limits():
    words = [Word("One.", 0.0, 0.4), Word("Two", 0.5, 0.9), Word("three", 2.0, 2.4), Word("four", 2.5, 9.0)]
    assert [c.line for c in cues(words, seconds=4)] == ["One.", "Two", "three", "four"]
    long = [Word("abcdefghi", i, i + 0.9) for i in range(6)]
    assert [c.line for c in cues(long, characters=20, seconds=99)] == ["abcdefghi abcdefghi"] * 3


def test_long_times_are_written_with_hours():
    text = write([Segment([Word("late", 36000.0005, 36001.9996)])], "srt")
    assert "10:00:00,000 --> 10:00:02,000" in text
