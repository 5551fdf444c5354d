"""What a recording's transcript and an answer are: typed, frozen, ready for JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from core import subtitles
from core.spelling import join_words
from model.generation.timestamps import Word

#: Formats of `Transcription.write`, by the extension of their files.
FORMATS = ("text", "json", "srt", "vtt", "ctm", "textgrid")
_EXTENSIONS = {"text": "txt", "textgrid": "TextGrid"}


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording that was transcribed at once. start, end: seconds, from the first to the last
    token that the CTC head finds. confidence: the geometric mean of the CTC head's probabilities of those
    tokens. words: empty unless word times were asked for. speaker: of a channel that was transcribed by
    itself."""

    text: str
    start: float
    end: float
    confidence: float
    words: tuple[Word, ...] = ()
    speaker: str | None = None


@dataclass(frozen=True)
class Transcription:
    """What is said in a recording. language: as it was given, None where it was not. notes: what was noticed
    about the audio, a line each. skipped_seconds: of stretches in which the CTC head finds no speech."""

    text: str
    segments: tuple[Segment, ...]
    duration: float
    language: str | None = None
    notes: tuple[str, ...] = ()
    skipped_seconds: float = 0.0

    def __str__(self) -> str:
        return self.text

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments, with their times in the recording."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def confidence(self) -> float:
        """The mean of the segments' confidences, by their length; 0 without segments."""
        seconds = [max(segment.end - segment.start, 1e-3) for segment in self.segments]
        total = sum(share * segment.confidence for share, segment in zip(seconds, self.segments, strict=True))
        return total / sum(seconds) if seconds else 0.0

    def write(self, format: str, name: str = "audio") -> str:
        """Return the transcript as a file's text. format: one of FORMATS; name: of the recording.

        Subtitles are cut at sentences and pauses where words have times, and are the segments elsewhere.
        Errors: ValueError for an unknown format.
        """
        if format not in FORMATS:
            raise ValueError(f"format is '{format}': give {', '.join(FORMATS)}")
        if format == "text":
            return self.by_speaker() + "\n"
        segments = [
            subtitles.Segment(s.words, s.text, s.speaker, s.start, s.end) for s in self.segments if s.text
        ]
        if format in ("srt", "vtt"):
            segments = [
                cue
                for segment in segments
                for cue in (
                    subtitles.cues(segment.words, speaker=segment.speaker) if segment.words else [segment]
                )
            ]
        text = subtitles.write(segments, _EXTENSIONS.get(format, format), name=name, seconds=self.duration)
        if format != "json":
            return text
        rows = json.loads(text)["segments"]
        for row, segment in zip(rows, (s for s in self.segments if s.text), strict=True):
            row["confidence"] = round(segment.confidence, 3)
        whole = {
            "name": name,
            "duration": round(self.duration, 3),
            "language": self.language,
            "confidence": round(self.confidence, 3),
            "text": self.text,
            "skipped_seconds": round(self.skipped_seconds, 3),
            "notes": list(self.notes),
            "segments": rows,
        }
        return json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def by_speaker(self) -> str:
        """Return the text; of several speakers a line for each turn, with the speaker's name."""
        if len({segment.speaker for segment in self.segments}) < 2:
            return self.text
        lines: list[str] = []
        speaker: str | None = None
        for segment in self.segments:
            if segment.speaker == speaker and lines:
                lines[-1] = join_words([lines[-1], segment.text])
            else:
                lines.append(f"{segment.speaker}: {segment.text}")
            speaker = segment.speaker
        return "\n".join(lines)


def extension(format: str) -> str:
    """Return the extension of a format's files."""
    return _EXTENSIONS.get(format, format)


@dataclass(frozen=True)
class Answer:
    """What the LLM answers to a question about a clip. notes: as of `Transcription`."""

    text: str
    duration: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text
