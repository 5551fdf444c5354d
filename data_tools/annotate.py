"""Write a manifest with hypotheses by Whisper, durations and hashes, for filters.

    python -m data_tools.annotate --corpus NAME:PATH --out M.jsonl --hash --whisper DIR

Reads the audio of a corpus once and writes a manifest of it with what was found: duration, and on request
sound_hash (for pack's --drop-duplicates) and hypothesis, a Whisper model's transcript (for pack's --max-wer).
`pack --manifest M.jsonl` then decides by metadata alone, which is what makes its plan, and so its bytes, the
same in every run.

    window of entries -> decode in worker processes -> Whisper, batches of similar length -> lines, in the
    corpus' order

Lines are kept window by window; the same command again after an interruption continues after the last one. A
clip that cannot be read becomes a line in M.jsonl.rejected.jsonl, and so does a shell command in place of a
file, unless --allow-pipes is given. Parts of an array job (--part i/N) write one manifest each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from core.audio import SAMPLE_RATE, to_mono
from core.command_line import CommandParser
from core.console import one_line, print_error
from core.languages import language_code
from data_tools.audio import read_clip
from data_tools.corpora import CorpusError, Entry, Ignored, Rejection, fault_of, open_apart
from data_tools.filters import piped
from data_tools.progress import Progress
from data_tools.shards import OutputError
from data_tools.workers import start_worker

_READERS = (
    "2"  # what readers yield, and so the place of a line in an unfinished file, is that of this version
)
WINDOW = 512  # entries that are decoded, transcribed and written together
WHISPER_SECONDS = 30.0  # Whisper's window; longer clips are cut and their texts joined


def hash_of(samples: np.ndarray, rate: int) -> str:
    """The same for the same sound: of samples, rate and channels, not of the file (a WAV and its FLAC are
    duplicates)."""
    digest = hashlib.blake2b(f"{rate}:{samples.shape[1]}:{samples.dtype}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(samples).tobytes())
    return digest.hexdigest()


def inspect_entry(
    entry: Entry, want_hash: bool, want_samples: bool
) -> tuple[Entry | Rejection, np.ndarray | None]:
    """One entry with its duration (and hash), and its samples [n] int16 at 16 kHz if wanted."""
    if entry.audio is None:
        return entry, None
    try:
        audio, _ = read_clip(entry.audio, entry.offset, entry.duration)
        wave = to_mono(audio, SAMPLE_RATE, "int16", levels=False).samples if want_samples else None
    except OutputError:
        raise
    except Exception as error:  # whatever one clip leads to
        return fault_of(error, entry.id, entry.corpus, "failed"), None
    entry.duration = round(audio.seconds, 6)
    if want_hash:
        entry.sound_hash = hash_of(audio.samples, audio.rate)
    return entry, wave


class Transcriber:
    """A Whisper model of transformers, greedy, in batches of clips of similar length and one language."""

    def __init__(self, folder: str, batch_seconds: float):
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        try:
            self.processor = WhisperProcessor.from_pretrained(folder)
            self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            self.model.to(torch.device(self.device))
        except (
            Exception
        ) as error:  # of a folder that others wrote: the libraries have no list of what it makes them raise
            raise CorpusError(f"--whisper {folder}: {one_line(error)}") from None
        self.batch_clips = max(1, int(batch_seconds // WHISPER_SECONDS))
        self.unknown: set[str] = set()  # languages that were reported already

    def __call__(self, clips: list[tuple[np.ndarray, str | None]]) -> list[str]:
        """[(samples int16 at 16 kHz, language)] -> texts, in the same order."""
        pieces = []
        for number, (samples, lang) in enumerate(clips):
            step = round(WHISPER_SECONDS * SAMPLE_RATE)
            pieces += [
                (number, start, lang, samples[start : start + step])
                for start in range(0, max(1, len(samples)), step)
            ]
        texts: dict[tuple[int, int], str] = {}
        # Clips of similar length end their texts at about the same token, so that no batch waits long for one
        # clip.
        pieces.sort(key=lambda piece: (piece[2] or "", len(piece[3]), piece[0], piece[1]))
        for lang, group in itertools.groupby(pieces, key=lambda piece: piece[2]):
            alike = list(group)
            for start in range(0, len(alike), self.batch_clips):
                batch = alike[start : start + self.batch_clips]
                for (number, place, _, _), text in zip(
                    batch, self._texts([piece[3] for piece in batch], lang), strict=True
                ):
                    texts[number, place] = text
        joined: list[list[str]] = [[] for _ in clips]
        for number, place in sorted(texts):
            joined[number].append(texts[number, place].strip())
        return [" ".join(parts) for parts in joined]

    def _texts(self, waves: list[np.ndarray], lang: str | None) -> list[str]:
        import torch

        waves = [wave.astype(np.float32) / 32768.0 for wave in waves]
        options = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "return_attention_mask": True}
        inputs = self.processor.feature_extractor(waves, **options).to(self.device)
        features, mask = inputs.input_features.to(self.model.dtype), inputs.attention_mask
        multilingual = getattr(self.model.generation_config, "is_multilingual", False)
        language_options = {}
        if multilingual and (code := language_code(lang)):
            if f"<|{code}|>" in (getattr(self.model.generation_config, "lang_to_id", None) or {}):
                language_options = {"language": code, "task": "transcribe"}
            elif code not in self.unknown:
                self.unknown.add(code)
                print_error(f"warning: this Whisper does not know language '{code}': it detects the language")
        with torch.inference_mode():
            ids = self.model.generate(
                features, attention_mask=mask, do_sample=False, num_beams=1, **language_options
            )
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def annotated(
    items: Iterable[Entry | Rejection], pool: ProcessPoolExecutor, want_hash: bool, transcriber
) -> Iterator[list[str]]:
    """Windows of manifest lines, one line for each item."""
    items = iter(items)
    while window := list(itertools.islice(items, WINDOW)):
        entries = [item for item in window if isinstance(item, Entry)]
        flags = itertools.repeat(want_hash), itertools.repeat(transcriber is not None)
        decoded = list(pool.map(inspect_entry, entries, *flags, chunksize=8))
        if transcriber is not None:
            clips = [
                (item, samples)
                for item, samples in decoded
                if isinstance(item, Entry) and samples is not None
            ]
            for (entry, _), text in zip(
                clips, transcriber([(samples, entry.lang) for entry, samples in clips]), strict=True
            ):
                entry.hypothesis = text
        results = iter(decoded)
        yield [(next(results)[0] if isinstance(item, Entry) else item).to_json() for item in window]


def run(options: argparse.Namespace) -> str:
    """Errors: CorpusError, OutputError, BrokenProcessPool."""
    unfinished = options.out.with_name(options.out.name + ".unfinished")
    settings = {
        key: str(value) for key, value in vars(options).items() if key not in ("workers", "batch_seconds")
    }
    settings["readers"] = _READERS
    corpora = open_apart(options.corpus)
    transcriber = Transcriber(options.whisper, options.batch_seconds) if options.whisper else None
    try:
        done = _resume(unfinished, settings)
        part, parts = options.part
        everything = (item for corpus in corpora for item in corpus if not isinstance(item, Ignored))
        items: Iterator[Entry | Rejection] = itertools.islice(everything, part + done * parts, None, parts)
        if not options.allow_pipes:
            items = ((piped(item) if isinstance(item, Entry) else None) or item for item in items)
        context = get_context("fork")
        with (
            ProcessPoolExecutor(options.workers, context, start_worker, (os.getpid(),)) as pool,
            open(unfinished, "a", encoding="utf-8") as out,
            Progress("annotating", done=done) as progress,
        ):
            for lines in annotated(items, pool, options.hash, transcriber):
                out.write("".join(line + "\n" for line in lines))
                out.flush()
                os.fsync(out.fileno())
                progress.to(progress.done + len(lines))
        return _finish(unfinished, options.out)
    except OSError as error:
        raise OutputError(f"cannot write {options.out}: {error.strerror or error}") from error


def _resume(unfinished: Path, settings: dict) -> int:
    """Return how many items are done. A partial line is cut off. The first line holds the command."""
    head = json.dumps(settings) + "\n"
    has_head = False
    if unfinished.exists():
        with open(unfinished, "rb") as file:
            has_head = b"\n" in file.read(1 << 16)
    if not has_head:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(head)
        return 0
    lines, length = -1, 0
    with open(unfinished, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                if lines < 0 and line.decode() != head:
                    raise CorpusError(
                        f"{unfinished} was begun with other options: finish it with those, or remove it"
                    )
                lines, length = lines + 1, length + len(line)
    os.truncate(unfinished, length)
    return lines


def _finish(unfinished: Path, out: Path) -> str:
    entries = faults = 0
    rejected = out.with_name(out.name + ".rejected.jsonl")
    sorted_out = out.with_name(out.name + ".sorted")
    with (
        open(unfinished, encoding="utf-8") as lines,
        open(sorted_out, "w", encoding="utf-8") as good,
        open(rejected, "w") as bad,
    ):
        next(lines)
        for line in lines:
            is_fault = "reason" in json.loads(line)
            (bad if is_fault else good).write(line)
            entries, faults = entries + (not is_fault), faults + is_fault
    os.replace(sorted_out, out)
    unfinished.unlink()
    return f"{out}: {entries:,} samples" + (f"; {faults:,} refused, named in {rejected}" if faults else "")


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: i/N with i from 0 to N-1")
    return int(part), int(parts)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m data_tools.annotate", __doc__, example="--corpus folder:clips --hash --out clips.jsonl"
    )
    parser.add_argument(
        "--corpus",
        action="append",
        required=True,
        metavar="NAME:PATH[,option=value]",
        help="a corpus by its format's name; repeatable",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="M.jsonl", help="the manifest to write")
    parser.add_argument(
        "--allow-pipes",
        action="store_true",
        help="run the shell commands that a corpus gives in place of files",
    )
    parser.add_argument(
        "--hash", action="store_true", help="sound_hash: equal for clips with the same samples"
    )
    parser.add_argument(
        "--whisper",
        metavar="DIR",
        help="hypothesis: this Whisper model's transcript (the paper filtered by whisper-medium)",
    )
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=480.0,
        help="audio that Whisper takes at once, 30 s a clip (default: 480)",
    )
    parser.add_argument(
        "--part", type=_part, default="0/1", metavar="i/N", help="annotate every N-th entry, from i = 0 on"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="reading processes")
    options = parser.parse_args(argv)
    try:
        print(run(options))
        return 0
    except CorpusError as error:
        print_error("error:", error)
        return 2
    except OutputError as error:
        print_error(f"error: {error}; run the same command again: it continues")
    except BrokenProcessPool:
        print_error("error: a worker process died (out of memory?); run the same command again: it continues")
    return 1


if __name__ == "__main__":
    sys.exit(main())
