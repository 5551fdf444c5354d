"""The console command `soundwave`: one name for the programs of all packages.

    soundwave pack --manifest corpus.jsonl --out data/train     the same as `python -m data_tools.pack ...`
    soundwave train train/recipes/stage1.yaml --dry-run         the same as `python -m train.run ...`

Each command runs its module as `python -m` does, with the arguments that follow the name. Nothing else is
imported before that, so `soundwave --help` is quick.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import NamedTuple

from core import __version__
from core.command_line import set_command
from core.near_names import did_you_mean, near_names


class Command(NamedTuple):
    module: str  # started as `python -m MODULE` would start it
    summary: str


#: In the order of a project: data, training, results, models for others.
COMMANDS = {
    "pack": Command("data_tools.pack", "pack a corpus into shards with an index"),
    "annotate": Command("data_tools.annotate", "transcribe clips with Whisper, to filter by WER"),
    "instruct": Command("data_tools.instruct", "write instruction samples from transcripts and labels"),
    "show": Command("data_tools.show", "print what a packed folder holds"),
    "copy": Command("data_tools.copy_packed", "copy a packed folder to or from an object store"),
    "verify": Command("data_tools.verify", "check the shards of a packed folder"),
    "look": Command("stream", "inspect the first steps of a recipe before training"),
    "cache": Command("stream.cache", "store the encoder's features of a recipe's data"),
    "preflight": Command("train.preflight", "check the nodes of a job before training"),
    "train": Command("train.run", "train one stage"),
    "status": Command("train.status", "print the state of a run's stages and jobs"),
    "report": Command("train.report", "write one HTML page about a run"),
    "evaluate": Command("evaluation.run", "write predictions for packed data and score them"),
    "score": Command("evaluation.score", "score prediction files"),
    "compare": Command("evaluation.compare", "compare two prediction files with a paired test"),
    "transcribe": Command("soundwave.transcribe", "transcribe recordings of any length"),
    "answer": Command("evaluation.answer", "answer questions about audio files"),
    "align": Command("evaluation.align", "find the times of the words of transcripts"),
    "speed": Command("evaluation.speed", "measure the time to the first token and the throughput"),
    "picture": Command("evaluation.picture", "draw one clip: spectrogram, CTC peaks, compressed frames"),
    "demo": Command("evaluation.demo", "serve a web page to try a model"),
    "serve": Command("serving", "serve a model with an OpenAI-compatible HTTP API"),
    "export": Command("model.export", "export a model folder for transformers, peft and vLLM"),
    "push": Command("model.push", "upload an exported folder to the Hugging Face Hub"),
    "average": Command("model.average", "average the weights of model folders"),
    "convert": Command("model.convert", "convert the official checkpoint to a model folder, or back"),
}


def overview() -> str:
    """Return the text of `soundwave --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: soundwave COMMAND ...",
            "       soundwave COMMAND --help     the options of a command",
            "       soundwave --version",
            "",
            "Training system for Soundwave speech LLMs.",
            "",
            "commands:",
            *lines,
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run `soundwave`. Exit codes: the command's own; 2 for a command that does not exist."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"soundwave {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(near_names(name, COMMANDS)) or "soundwave --help lists the commands"
        print(f"error: soundwave has no command '{name}': {hint}", file=sys.stderr)
        return 2
    set_command(f"soundwave {name}")
    package = COMMANDS[name].module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        print(
            f"error: package {package} of this repository is not installed: run make setup again (the "
            "environment is older than the code)",
            file=sys.stderr,
        )
        return 2
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)
    return 0
