"""Word times as files: JSON, SubRip (SRT), WebVTT, NIST's CTM and Praat's TextGrid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import regex

from core.spelling import join_words


class TimedWord(Protocol):
    """What a segment is made of; `model.generation.timestamps.Word` for one."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def confidence(self) -> float: ...


@dataclass(frozen=True)
class Segment:
    """Words that are shown together. text: as they are written together, where that is known; words may then
    be empty, with start and end given."""

    words: Sequence[TimedWord] = ()
    text: str | None = None
    speaker: str | None = None
    start: float | None = None
    end: float | None = None

    @property
    def begins(self) -> float:
        return self.words[0].start if self.start is None and self.words else self.start or 0.0

    @property
    def ends(self) -> float:
        last = max((word.end for word in self.words), default=self.begins)
        return max(last if self.end is None else self.end, self.begins)

    @property
    def line(self) -> str:
        text = join_words([word.text for word in self.words]) if self.text is None else self.text
        return " ".join(text.split())


def cues(
    words: Sequence[TimedWord],
    *,
    characters: int = 84,
    seconds: float = 7.0,
    pause: float = 0.8,
    speaker: str | None = None,
) -> list[Segment]:
    """Cut words into segments for subtitles: after the end of a sentence and at pauses; never longer than
    `characters` (two lines of 42) or `seconds`, but for a single word that is."""
    groups: list[list[TimedWord]] = []
    for word in words:
        own = groups[-1] if groups else []
        if (
            not own
            or regex.search(r"[.!?…。！？؟।][\p{Pe}\p{Pf}\"']*$", own[-1].text)
            or word.start - own[-1].end >= pause
            or word.end - own[0].start > seconds
            or len(join_words([w.text for w in own] + [word.text])) > characters
        ):
            groups.append([])
        groups[-1].append(word)
    return [Segment(tuple(own), speaker=speaker) for own in groups]


def write(
    segments: Sequence[Segment], format: str, *, name: str = "audio", seconds: float | None = None
) -> str:
    """Return segments as the text of a file.

    format: one of FORMATS. name: of the recording (CTM). seconds: of the whole recording (TextGrid; default:
    the end of its last word). Errors: ValueError for an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format '{format}' is unknown: give one of {', '.join(FORMATS)}")
    return FORMATS[format](segments, name, seconds)


def _json(segments: Sequence[Segment], name: str, seconds: float | None) -> str:
    rows = [
        {
            "start": round(segment.begins, 3),
            "end": round(segment.ends, 3),
            "text": segment.line,
            **({"speaker": segment.speaker} if segment.speaker is not None else {}),
            "words": [
                {
                    "text": word.text,
                    "start": round(word.start, 3),
                    "end": round(word.end, 3),
                    "confidence": round(word.confidence, 3),
                }
                for word in segment.words
            ],
        }
        for segment in segments
    ]
    return json.dumps({"segments": rows}, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(max(seconds, 0.0) * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{comma}{rest % 1000:03d}"


def _cue_times(segment: Segment, comma: str) -> str:
    end = max(segment.ends, segment.begins + 0.001)  # players drop cues without a length
    return f"{_clock(segment.begins, comma)} --> {_clock(end, comma)}"


def _srt(segments: Sequence[Segment], name: str, seconds: float | None) -> str:
    spoken = [segment for segment in segments if segment.line]
    return "".join(
        f"{number}\n{_cue_times(segment, ',')}\n{_spoken(segment)}{segment.line.replace('-->', '->')}\n\n"
        for number, segment in enumerate(spoken, 1)
    )


def _spoken(segment: Segment) -> str:
    return f"{' '.join(segment.speaker.split())}: " if segment.speaker else ""


def _vtt(segments: Sequence[Segment], name: str, seconds: float | None) -> str:
    blocks = ["WEBVTT\n\n"]
    for segment in segments:
        if segment.line:
            voice = f"<v {_escaped(' '.join(segment.speaker.split()))}>" if segment.speaker else ""
            blocks.append(f"{_cue_times(segment, '.')}\n{voice}{_escaped(segment.line)}\n\n")
    return "".join(blocks)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _ctm(segments: Sequence[Segment], name: str, seconds: float | None) -> str:
    """A line a word: recording, channel, start, duration, word, confidence. Separate signs are left
    out, since a CTM line has one word."""
    recording = "_".join(name.split()).lstrip(";") or "audio"
    channels = {
        speaker: str(number) for number, speaker in enumerate(dict.fromkeys(s.speaker for s in segments), 1)
    }
    rows = [
        (word.start, channels[segment.speaker], word)
        for segment in segments
        for word in segment.words
        if regex.search(r"[\p{L}\p{N}]", word.text)
    ]
    rows.sort(key=lambda row: (row[1], row[0]))
    return "".join(
        f"{recording} {channel} {start:.3f} {max(word.end - word.start, 0.0):.3f} "
        f"{_one_word(word.text)} {word.confidence:.3f}\n"
        for start, channel, word in rows
    )


def _one_word(text: str) -> str:
    return "_".join(piece for piece in text.split() if regex.search(r"[\p{L}\p{N}]", piece))


def _textgrid(segments: Sequence[Segment], name: str, seconds: float | None) -> str:
    """Praat's long text form: a tier of words and one of segments, for each speaker."""
    end = max([seconds or 0.0, *(segment.ends for segment in segments)])
    end = max(end, 0.001)
    tiers: list[tuple[str, list[tuple[float, float, str]]]] = []
    for speaker in dict.fromkeys(segment.speaker for segment in segments) or [None]:
        own = [segment for segment in segments if segment.speaker == speaker]
        suffix = f" {speaker}" if speaker is not None else ""
        spoken = [(word.start, word.end, word.text) for segment in own for word in segment.words]
        tiers.append((f"words{suffix}", _intervals(spoken, end)))
        tiers.append((f"segments{suffix}", _intervals([(s.begins, s.ends, s.line) for s in own], end)))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end:.6f}",
        "tiers? <exists>",
        f"size = {len(tiers)}",
        "item []:",
    ]
    for number, (tier, intervals) in enumerate(tiers, 1):
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f'        name = "{_quoted(tier)}"',
            "        xmin = 0",
            f"        xmax = {end:.6f}",
            f"        intervals: size = {len(intervals)}",
        ]
        for place, (start, stop, text) in enumerate(intervals, 1):
            lines += [
                f"        intervals [{place}]:",
                f"            xmin = {start:.6f}",
                f"            xmax = {stop:.6f}",
                f'            text = "{_quoted(text)}"',
            ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return " ".join(text.split()).replace('"', '""')


def _intervals(spoken: list[tuple[float, float, str]], end: float) -> list[tuple[float, float, str]]:
    """Intervals that fill 0 to `end` without a gap, as a TextGrid's have to. What has no length is written
    into the interval before it."""
    filled: list[tuple[float, float, str]] = []
    now = 0.0
    for start, stop, text in sorted(spoken, key=lambda item: item[0]):
        start, stop = max(round(start, 6), now), round(min(stop, end), 6)
        if stop <= start:
            if filled and text:
                begin, last, before = filled[-1]
                filled[-1] = (begin, last, f"{before} {text}".strip())
            continue
        if start > now:
            filled.append((now, start, ""))
        filled.append((start, stop, text))
        now = stop
    if round(end, 6) > now:
        filled.append((now, round(end, 6), ""))
    return filled


#: Writers by the format's name, which is the file's extension, too.
FORMATS: dict[str, Callable[[Sequence[Segment], str, float | None], str]] = {
    "json": _json,
    "srt": _srt,
    "vtt": _vtt,
    "ctm": _ctm,
    "TextGrid": _textgrid,
}
