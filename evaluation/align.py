"""Add word times to a corpus: `python -m evaluation.align MODEL --corpus manifest:M.jsonl --out OUT.jsonl`.

    python -m evaluation.align MODEL --corpus manifest:clips.jsonl --out timed.jsonl
    python -m evaluation.align MODEL --corpus manifest:books.jsonl --out clips.jsonl --segment
    python -m data_tools.pack --manifest clips.jsonl --out data/books

The first adds `words` to each line: text, start and end (seconds from the clip's start), confidence. The
second cuts recordings of any length at pauses into clips with their part of the transcript: a manifest with
offset and duration, which pack takes. The text is aligned as it is; nothing is transcribed. What cannot be
aligned is named, with the reason, in OUT.rejected.jsonl. A stage 1 folder is enough: the CTC head aligns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from core.audio import SAMPLE_RATE, AudioError, to_mono
from core.command_line import CommandParser
from core.console import one_line, plural, print_error
from core.samples import PromptError
from core.spelling import word_spans
from core.subtitles import FORMATS, cues, write
from data_tools.audio import read_clip
from data_tools.corpora import Corpus, CorpusError, Entry, Ignored, Rejection, fault_of, malformed, open_apart
from data_tools.filters import piped
from data_tools.segments import Cutting, cut
from model import artifact
from model.artifact import FolderError
from model.generation.recordings import align_recording
from model.generation.timestamps import Aligned, Word, align
from model.pretrained import SourceError, device_of

#: Clips whose audio is in memory at a time; a recording of hours is a batch by itself.
CLIPS, BATCH_SECONDS = 64, 600.0
#: Seconds of the longest recording that is read.
LONGEST = 12 * 3600.0


class Rejected(ValueError):
    """One sample that cannot be aligned; `reason` is the fixed word by which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def entries(corpora: list[Corpus], allow_pipes: bool) -> Iterator[Entry | Rejection]:
    for corpus in corpora:
        for item in corpus:
            if isinstance(item, Ignored):
                continue
            if isinstance(item, Entry):
                item = malformed(item) or (None if allow_pipes else piped(item)) or item
            yield item


def read(entry: Entry) -> torch.Tensor:
    """The entry's waveform [S], 16 kHz mono. Errors: Rejected, AudioError."""
    if entry.audio is None:
        raise Rejected("no_audio", "it has no audio")
    if not (entry.text or "").strip():
        raise Rejected("no_text", "it has no text to align")
    audio, _ = read_clip(entry.audio, entry.offset, entry.duration, max_seconds=LONGEST)
    return torch.from_numpy(to_mono(audio, SAMPLE_RATE, levels=False).samples)


def batches(
    items: Iterator[Entry | Rejection],
) -> Iterator[tuple[list[tuple[Entry, torch.Tensor]], list[Rejection]]]:
    """Clips with their waveforms, and what could not be read, in the corpus' order."""
    clips: list[tuple[Entry, torch.Tensor]] = []
    faults: list[Rejection] = []
    for item in items:
        if isinstance(item, Rejection):
            faults.append(item)
        else:
            try:
                clips.append((item, read(item)))
            except (Rejected, AudioError, OSError, MemoryError) as error:
                faults.append(fault_of(error, item.id, item.corpus, getattr(error, "reason", "failed")))
        seconds = sum(len(waveform) for _, waveform in clips) / SAMPLE_RATE
        if len(clips) + len(faults) >= CLIPS or seconds >= BATCH_SECONDS:
            yield clips, faults
            clips, faults = [], []
    yield clips, faults


def aligned(model, clips: list[tuple[Entry, torch.Tensor]]) -> list[Aligned]:
    """Short clips together, long ones one by one in windows."""
    longest = min(30.0, model.config.encoder.max_seconds)
    results: dict[int, Aligned] = {}
    short = [i for i, (_, waveform) in enumerate(clips) if len(waveform) <= longest * SAMPLE_RATE]
    together = align(
        model,
        [clips[i][1] for i in short],
        [clips[i][0].text or "" for i in short],
        [clips[i][0].lang for i in short],
    )
    for i, one in zip(short, together, strict=True):
        results[i] = one
    for i, (entry, waveform) in enumerate(clips):
        if i not in results:
            results[i] = align_recording(model, waveform, entry.text or "", entry.lang)
    return [results[i] for i in range(len(clips))]


def timed(entry: Entry, alignment: Aligned) -> dict:
    """The entry's line with word times. Errors: Rejected."""
    if alignment.problem:
        raise Rejected("not_aligned", alignment.problem)
    return entry.fields() | {"words": [rounded(word) for word in alignment.words]}


def rounded(word: Word, offset: float = 0.0) -> dict:
    return {
        "text": word.text,
        "start": round(word.start - offset, 3),
        "end": round(word.end - offset, 3),
        "confidence": round(word.confidence, 3),
    }


def segments(
    entry: Entry, alignment: Aligned, seconds: float, cutting: Cutting, least_confidence: float
) -> tuple[list[dict], list[Rejection]]:
    """Lines of the clips that a recording is cut into, and clips that are of no use."""
    written = entry.text or ""
    spans = word_spans(written, entry.lang)
    words = alignment.words
    while words and words[-1].confidence == 0 and words[-1].start == words[-1].end:
        words = words[:-1]  # after the audio's end, or signs that take no time
    rows, faults = [], []
    if alignment.problem:
        faults.append(Rejection(entry.id, "not_aligned", alignment.problem, entry.corpus))
        if len(words) == 0 or words[-1].confidence == 0:
            return [], faults
    for number, clip in enumerate(cut(words, seconds, cutting)):
        name = f"{entry.id}-{number:05d}"
        problem = clip.problem and ("no_pause", clip.problem)
        if not problem and clip.confidence < least_confidence:
            problem = (
                "confidence",
                f"mean confidence {clip.confidence:.3f} is below {least_confidence:g} "
                f"({clip.start:.1f} to {clip.end:.1f} s)",
            )
        if problem:
            faults.append(Rejection(name, *problem, entry.corpus))
            continue
        last = len(spans) if clip.last == len(words) and not alignment.problem else clip.last
        text = " ".join(written[spans[clip.first][0] : spans[last - 1][1]].split())
        rows.append(
            entry.fields()
            | {
                "id": name,
                "text": text,
                "offset": round((entry.offset or 0.0) + clip.start, 3),
                "duration": round(clip.end - clip.start, 3),
                "recording": entry.recording or entry.id,
                "group": entry.group or entry.audio,
                "words": [rounded(word, clip.start) for word in words[clip.first : clip.last]],
                "confidence": round(clip.confidence, 3),
            }
        )
    return rows, faults


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "python -m evaluation.align",
        __doc__,
        example="runs/me/alignment/model --corpus folder:clips --out words.jsonl",
    )
    cutting = Cutting()
    parser.add_argument("model", type=Path, help="model folder of any stage: <output>/<stage>/model")
    parser.add_argument(
        "--corpus",
        action="append",
        required=True,
        metavar="NAME:PATH[,option=value]",
        help="a corpus by its format's name; repeatable",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="JSON lines to write")
    parser.add_argument("--segment", action="store_true", help="cut recordings at pauses into clips")
    parser.add_argument(
        "--max-seconds", type=float, default=cutting.most, help="of a clip (default: %(default)g)"
    )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=cutting.least,
        help="shorter clips are joined (default: %(default)g)",
    )
    parser.add_argument(
        "--pause", type=float, default=cutting.pause, help="silence that a cut needs (default: %(default)g s)"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, help="reject clips below it (default: none)"
    )
    parser.add_argument("--subtitles", choices=list(FORMATS), help="write a file for each recording, too")
    parser.add_argument("--allow-pipes", action="store_true", help="run shell commands given for files")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    for name in ("max_seconds", "min_seconds", "pause", "min_confidence"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more")
    if not options.min_seconds < options.max_seconds:
        parser.error("--min-seconds must be below --max-seconds")
    return options


def run(options: argparse.Namespace) -> str:
    """Errors: CorpusError, FolderError, SourceError, OSError."""
    device = device_of(options.device)
    items = entries(open_apart(options.corpus), options.allow_pipes)
    model = artifact.load(options.model, device=device, with_llm=False)
    cutting = Cutting(options.max_seconds, options.min_seconds, options.pause)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_name(options.out.name + ".unfinished")
    rejected = options.out.with_name(options.out.name + ".rejected.jsonl")
    titles = options.out.with_name(options.out.stem + ".subtitles")
    lines = refused = 0
    with (
        open(unfinished, "w", encoding="utf-8") as out,
        open(rejected, "w", encoding="utf-8") as bad,
        tqdm(desc="align", unit="clip") as progress,
    ):
        for clips, faults in batches(items):
            rows: list[dict] = []
            for (entry, waveform), alignment in zip(clips, aligned(model, clips), strict=True):
                seconds = len(waveform) / SAMPLE_RATE
                try:
                    if options.segment:
                        its_rows, its_faults = segments(
                            entry, alignment, seconds, cutting, options.min_confidence
                        )
                        rows += its_rows
                        faults += its_faults
                    else:
                        rows.append(timed(entry, alignment))
                except Rejected as problem:
                    faults.append(Rejection(entry.id, problem.reason, str(problem), entry.corpus))
                    continue
                if options.subtitles and alignment.words:
                    titles.mkdir(exist_ok=True)
                    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in entry.id)
                    text = write(cues(alignment.words), options.subtitles, name=name, seconds=seconds)
                    (titles / f"{name}.{options.subtitles}").write_text(text, encoding="utf-8")
            out.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            bad.writelines(json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults)
            lines, refused = lines + len(rows), refused + len(faults)
            progress.update(len(clips))
    os.replace(unfinished, options.out)
    if not refused:
        rejected.unlink()
    note = f"; {refused:,} rejected, named in {rejected}" if refused else ""
    return f"{options.out}: {plural(lines, 'clip' if options.segment else 'sample')}{note}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    disable_progress_bar()  # of transformers' weight loading
    try:
        print(run(options))
        return 0
    except (CorpusError, FolderError, SourceError, PromptError) as error:
        print_error(f"error: {one_line(error)}")
        return 2
    except OSError as error:
        print_error(f"error: cannot write {options.out}: {error.strerror or error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
