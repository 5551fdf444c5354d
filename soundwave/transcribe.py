"""Transcribe recordings of any length: `python -m soundwave.transcribe MODEL FILE ...`

    python -m soundwave.transcribe runs/my/sft/model meeting.mp3
    python -m soundwave.transcribe runs/my/sft/model *.wav --format srt --out subtitles
    python -m soundwave.transcribe runs/my/sft/model call.wav --channels split --timestamps word --format json

Transcripts go to standard output, or with --out each to a file of its own. Progress and notes about the
audio go to standard error. A file that cannot be used is named there, the others are transcribed all the
same, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from core.audio import AudioError, Recording
from core.command_line import CommandParser
from core.console import one_line, print_error, print_text
from core.decode_names import decode_name
from core.files import write_atomically
from data_tools.progress import Progress
from model.artifact import FolderError
from model.pretrained import SourceError
from soundwave.decoding import DECODES
from soundwave.recogniser import Options, load
from soundwave.results import FORMATS, Transcription, extension

WORD_FORMATS = ("srt", "vtt", "ctm", "textgrid")  # made of word times


def hotwords_of(given: str) -> list[str]:
    """Return the words of `--hotwords`: the lines of a file, or a list with commas. Errors: ValueError."""
    path = Path(given)
    if path.is_dir():
        raise ValueError(f"--hotwords {given}: is a folder; give a file of lines, or words as 'Ann,Bob'")
    if "," not in given and (path.suffix or "/" in given) and not path.is_file():
        raise ValueError(f"--hotwords {given}: there is no such file; give words with commas, as 'Ann,Bob'")
    if path.is_file():
        try:
            words = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--hotwords {given}: {one_line(error)}") from None
    else:
        words = given.split(",")
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise ValueError(f"--hotwords {given}: holds no words")
    return words


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = {one.name: one.default for one in fields(Options)}
    parser = CommandParser(
        "python -m soundwave.transcribe",
        __doc__.splitlines()[0].split(":")[0] + ".",
        example="runs/me/sft/model talk.mp3 --format srt",
    )
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="audio: WAV, FLAC, MP3, Ogg ...")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <DIR>/<FILE's name>.<format>")
    parser.add_argument(
        "--timestamps", choices=["word"], help="times of words (implied by srt, vtt, ctm and textgrid)"
    )
    parser.add_argument(
        "--hotwords", metavar="FILE|A,B", help="words or phrases to favour: a file of lines, or a list"
    )
    parser.add_argument(
        "--hotword-bonus",
        type=float,
        default=default["hotword_bonus"],
        help="added for each token of a hotword",
    )
    parser.add_argument("--hotwords-in-prompt", action="store_true", help="name them in the prompt, too")
    parser.add_argument(
        "--language",
        help="of the speech, e.g. en: decides what a word is; the prompt names none, and none is detected",
    )
    parser.add_argument(
        "--channels", choices=["mix", "split"], default="mix", help="split: each channel is a speaker"
    )
    parser.add_argument(
        "--decode",
        choices=DECODES,
        type=decode_name,
        help="default: ctc for stage 1, joint with --hotwords, else drafted in fp32 or greedy",
    )
    for name, kind, text in (
        ("batch_seconds", float, "padded seconds of audio in a batch"),
        (
            "window_seconds",
            float,
            "longest stretch transcribed at once (default: 10, or what the model takes)",
        ),
        ("pause_seconds", float, "without a token that end a stretch; 0: only its length does"),
        ("overlap_seconds", float, "of neighbouring stretches"),
        ("gate", float, "probability of a token below which a stretch is silence; 0: no gate"),
        ("max_new_tokens", int, "of one stretch"),
        ("beams", int, "of joint"),
        ("ctc_weight", float, "of joint"),
        ("token_bonus", float, "of joint"),
    ):
        if default[name] is not None:
            text += " (default: %(default)s)"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default[name], metavar="N", help=text
        )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the frozen parts")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser.parse_args(arguments)


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options of `transcribe`. Errors: ValueError."""
    given = {
        one.name: getattr(arguments, one.name) for one in fields(Options) if hasattr(arguments, one.name)
    }
    given["hotwords"] = hotwords_of(arguments.hotwords) if arguments.hotwords else ()
    if arguments.format in WORD_FORMATS:
        given["timestamps"] = "word"
    return Options(**given)


def output_files(arguments: argparse.Namespace) -> list[Path | None]:
    """Return where each transcript goes, None for standard output. Errors: ValueError."""
    if arguments.out is None:
        if len(arguments.files) > 1 and arguments.format != "text":
            raise ValueError(f"--format {arguments.format} of several files: give --out DIR")
        return [None] * len(arguments.files)
    paths = [arguments.out / f"{file.stem}.{extension(arguments.format)}" for file in arguments.files]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            first = arguments.files[paths.index(path)]
            raise ValueError(f"{first} and {arguments.files[place]} would both be written to {path}")
        if path.exists() and path.resolve() in [file.resolve() for file in arguments.files]:
            raise ValueError(f"--out {arguments.out}: {path} is one of the files to transcribe")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"--out {arguments.out}: is a file; give a folder") from None
    except OSError as error:
        raise ValueError(f"--out {arguments.out}: {error.strerror or error}") from None
    return paths


def total_seconds(files: list[Path]) -> float | None:
    """Return the length of all files by their headers; None where one does not tell."""
    total = 0.0
    for file in files:
        try:
            seconds = Recording(file).seconds()
        except AudioError:
            continue
        if seconds is None:
            return None
        total += seconds
    return total


def give(result: Transcription, file: Path, path: Path | None, arguments: argparse.Namespace) -> None:
    """Write one transcript, its notes to standard error."""
    for note in result.notes:
        print_error(f"warning: {file}: {note}")
    text = result.write(arguments.format, file.stem)
    if path is not None:
        write_atomically(path, text)
    elif len(arguments.files) > 1:
        for line in text.splitlines() or [""]:
            print_text(file, line, sep="\t", flush=True)
    else:
        print_text(text.removesuffix("\n"), flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    disable_progress_bar()  # of transformers' weight loading
    code = 0
    try:
        how, paths = options_of(options), output_files(options)
        model = load(
            options.model, device=options.device, dtype=options.dtype, with_llm=options.decode != "ctc"
        )
        total = None if options.quiet else total_seconds(options.files)
        bar = nullcontext() if options.quiet else Progress("transcribe", total, " s of audio")
        with bar as progress:
            results = model.transcribe_all(
                options.files, progress=progress.to if progress else None, options=how
            )
            for file, path, result in zip(options.files, paths, results, strict=True):
                if isinstance(result, Exception):
                    print_error(f"error: {file}: {result}")
                    code = 2
                    continue
                give(result, file, path, options)
    except (ValueError, FolderError, SourceError) as error:
        print_error(f"error: {error}")
        return 2
    except OSError as error:  # of writing
        print_error(f"error: {error.filename or 'standard output'}: {error.strerror or error}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
