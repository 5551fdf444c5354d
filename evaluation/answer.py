"""Transcribe audio files, or answer questions about them.

    python -m evaluation.answer runs/mine/sft/model clip.wav other.flac                    # transcribes
    python -m evaluation.answer runs/mine/sft/model clip.wav --prompt "What is asked here?"

One line a file on standard output: the file, a tab, the answer. A stage 1 folder has no LLM: its CTC head
transcribes, and a file without speech has no text. Recordings of any length: `python -m
soundwave.transcribe`. A file that cannot be used is named in one line on standard error, the others are
answered all the same, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

import soundwave
from core.command_line import CommandParser
from core.console import print_error, print_text
from core.decode_names import decode_name
from core.samples import INSTRUCTIONS, PromptError
from evaluation.run import DECODE_HELP, InputError
from model.artifact import FolderError, describe
from model.pretrained import SourceError
from model.stages import STAGES
from soundwave.decoding import DECODES
from soundwave.results import Answer, Transcription


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "python -m evaluation.answer",
        __doc__.splitlines()[0],
        example='runs/me/sft/model clip.wav --prompt "What is said?"',
    )
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="sound: WAV, FLAC, MP3, Ogg ...")
    parser.add_argument(
        "--prompt", help=f'what the LLM is asked about each file (default: "{INSTRUCTIONS["asr"]}")'
    )
    parser.add_argument(
        "--decode",
        choices=DECODES,
        type=decode_name,
        help=DECODE_HELP,
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if options.prompt and options.decode in ("ctc", "joint"):
        parser.error(f"--decode {options.decode} writes transcripts: without --prompt")
    return options


def check(options: argparse.Namespace, has_llm: bool) -> None:
    """Errors: InputError for what the model cannot be asked."""
    if not has_llm and options.decode not in (None, "ctc"):
        raise InputError(
            f"{options.model} is of stage 1, which has no LLM: use --decode ctc, or the folder of a later "
            f"stage"
        )
    if not has_llm and options.prompt:
        raise InputError(
            f"{options.model} is of stage 1, which has no LLM to ask: leave --prompt out for a transcript, "
            f"or give the folder of a later stage"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    disable_progress_bar()  # of transformers' weight loading
    code = 0
    try:
        has_llm = STAGES[describe(options.model)["stage"]].needs_llm
        check(options, has_llm)
        model = soundwave.load(options.model, device=options.device, with_llm=options.decode != "ctc")
        token = model.network.config.audio_token
        if token in (options.prompt or ""):
            raise InputError(f"--prompt holds {token}: leave it out, the sound stands before the prompt")
        for file in options.files:
            try:
                answer: Answer | Transcription
                if options.prompt:
                    answer = model.answer(
                        file,
                        options.prompt,
                        max_new_tokens=options.max_new_tokens,
                        decode="drafted" if options.decode == "drafted" else "greedy",
                    )
                else:
                    answer = model.transcribe_clip(
                        file, decode=options.decode, max_new_tokens=options.max_new_tokens
                    )
            except PromptError:
                raise
            except ValueError as error:  # of this file's audio; AudioError among them
                print_error(f"error: {file}: {str(error).removeprefix(f'{file}: ')}")
                code = 2
                continue
            for note in answer.notes:
                print_error(f"warning: {file}: {note}")
            print_text(file, answer.text, sep="\t", flush=True)
    except (InputError, FolderError, SourceError, PromptError) as error:
        print_error(f"error: {error}")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
