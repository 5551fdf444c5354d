"""Transcribe audio files, or answer questions about them.

    python -m evaluation.answer runs/mine/sft/model clip.wav other.flac                    # transcribes
    python -m evaluation.answer runs/mine/sft/model clip.wav --prompt "What is asked here?"

One line a file on standard output: the file, a tab, the answer. A stage I folder has no LLM: its CTC head
transcribes. A file that cannot be used is named in one line on standard error, the others are answered all
the same, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from core.audio import AudioError, decode, largest_decoded
from core.console import print_error, print_text
from core.samples import INSTRUCTIONS, PromptError, asked
from evaluation.run import DECODE_HELP, DECODES, InputError, drafting, joint_search, load
from model.folder import FolderError
from model.generation.drafted import Drafting
from model.generation.joint import JointSearch
from model.pretrained import SourceError
from model.waveforms import SoundWarning


def sound(file: Path, longest: float) -> torch.Tensor:
    """The file's waveform [S], 16 kHz mono, of at most `longest` seconds; what is cut is answered as far as
    it goes. Findings about it are printed on standard error. Errors: AudioError."""
    try:
        audio = decode(file, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
    except AudioError as error:
        if error.reason == "too_long":
            raise AudioError(
                "too_long",
                f"lasts {error.seconds:.0f} s, this model takes {longest:g} s at most "
                "(model.encoder.max_seconds): cut it",
            ) from None
        raise
    for finding in audio.findings:
        print_error(f"warning: {file}: {finding.detail} ({finding.kind})")
    return torch.from_numpy(audio.samples)


@contextmanager
def printed_warnings(file: Path) -> Iterator[None]:
    """Print the model's warnings about a clip on standard error, under the file's name."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", SoundWarning)
        yield
    for warning in found:
        print_error(f"warning: {file}: {str(warning.message).removeprefix('waveform 0 ')}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.answer", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder: <output>/<stage>/model")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="sound: WAV, FLAC, MP3, Ogg ...")
    parser.add_argument(
        "--prompt", help=f'what the LLM is asked about each file (default: "{INSTRUCTIONS["asr"]}")'
    )
    parser.add_argument(
        "--decode",
        choices=DECODES,
        help=DECODE_HELP,
    )
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    search = JointSearch()  # evaluation.run's options, at their defaults
    parser.set_defaults(
        untrained=None,
        ctc_weight=search.weight,
        beams=search.beams,
        token_bonus=search.token_bonus,
        draft_tokens=Drafting.longest,
        draft_ratio=Drafting.minimum_ratio,
    )
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if options.prompt and options.decode in ("ctc", "joint"):
        parser.error(f"--decode {options.decode} writes transcripts: without --prompt")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    disable_progress_bar()  # of transformers' weight loading
    code = 0
    try:
        model, how = load(
            options, torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        )
        if options.prompt and how == "ctc":
            raise InputError(
                f"{options.model} is of stage I, which has no LLM to ask: leave --prompt out for a "
                f"transcript, or "
                "give the folder of a later stage"
            )
        token = model.config.audio_token
        if token in (options.prompt or ""):
            raise InputError(f"--prompt holds {token}: leave it out, the sound stands before the prompt")
        search = {
            "joint": joint_search(options) if how == "joint" else None,
            "drafted": drafting(options) if how == "drafted" else None,
        }
        chat = [asked(options.prompt or INSTRUCTIONS["asr"], token)]
        for file in options.files:
            try:
                waveform = sound(file, model.config.encoder.max_seconds)
                with printed_warnings(file):
                    if how == "ctc":
                        text = model.ctc_greedy(model.prompts([chat], [waveform]))[0]
                    else:
                        text = model.answer(
                            [chat], [waveform], max_new_tokens=options.max_new_tokens, **search
                        )[0]
            except PromptError:
                raise
            except ValueError as error:  # of this file's audio; AudioError among them
                print_error(f"error: {file}: {error}")
                code = 2
                continue
            print_text(file, " ".join(text.split()), sep="\t", flush=True)
    except (InputError, FolderError, SourceError, PromptError) as error:
        print_error(f"error: {error}")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
