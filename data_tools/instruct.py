"""Write instruction samples for stages 2 and 3 as a manifest.

    wrap   transcripts, translations and labels under many wordings of their task's instruction, the same
           wording for the same sample and seed; --chain makes a share of these "transcribe, then answer"
    text   text-only instruction sets (Alpaca, ShareGPT, OpenAI messages, prompt/response lines), no audio
    speak  their instructions spoken by a text-to-speech command, so that the audio is the question

Every sample keeps where it came from in `origin`. Templates are text files, a wording a line
(data_tools/templates/).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from core.command_line import CommandParser, accept_old_name
from core.console import print_error
from core.samples import answer_of
from data_tools.corpora import (
    CorpusError,
    Entry,
    Ignored,
    Item,
    Rejection,
    fault_of,
    kind_of_value,
    malformed,
    open_apart,
)
from data_tools.normalise import NORMALISERS, plain_label
from data_tools.progress import watched
from data_tools.shards import OutputError
from data_tools.sources import kind_of
from data_tools.text_files import Problem, json_items

TEMPLATES = Path(__file__).parent / "templates"
CHAIN_ANSWER = "Transcription: {text}\nAnswer: {answer}"


@dataclass(frozen=True)
class Template:
    """One wording: an instruction, and how the answer is put ({answer}: as the sample has it)."""

    instruction: str
    answer: str
    name: str  # FILE:LINE, for `origin`


def load_templates(path: Path) -> list[Template]:
    """Errors: CorpusError for a missing or empty file."""
    if not path.exists():
        template_names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.txt")))
        raise CorpusError(
            f"{path} does not exist: give --templates FILE, one instruction a line (there are some for "
            f"{template_names})"
        )
    templates = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            instruction, _, answer = line.partition(" => ")
            templates.append(
                Template(instruction.strip(), answer.strip() or "{answer}", f"{path.stem}:{number}")
            )
    if not templates:
        raise CorpusError(f"{path} holds no instruction")
    return templates


def draw(seed: int, what: str, key: str) -> float:
    """A number in [0, 1) that depends on seed, purpose and sample alone: the same in every run and order."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}:{what}:{key}".encode(), digest_size=8).digest(), "big")
        / 2**64
    )


def fill(template: str, values: dict[str, str]) -> str:
    """{name} replaced, other braces left alone (transcripts may hold any)."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def answer_to(task: str, entry: Entry) -> str | None:
    """Return what a corpus entry answers to a task; class names as words."""
    response = None if task == "asr" else entry.response  # a translation is no transcript
    label = plain_label(entry.label) if entry.label else None
    return answer_of({"task": task, "text": entry.text, "response": response, "label": label})


def wrap(
    entry: Entry,
    task: str,
    templates: list[Template],
    chains: list[Template],
    chain_share: float,
    target: str | None,
    seed: int,
    normalise: str = "raw",
) -> Entry | Rejection:
    """One corpus entry as a chat sample of `task`. target: language to translate into; None: the entry's,
    else English. normalise: of its transcript, before an answer is made of it."""
    if entry.text:
        entry = replace(entry, text=NORMALISERS[normalise](entry.text).strip())
    key = f"{entry.corpus}/{entry.id}"
    answer = answer_to(task, entry)
    if not answer:
        return Rejection(
            entry.id,
            "no_target",
            f"task {task} needs " + ("text" if task == "asr" else "a response or a label"),
            entry.corpus,
        )
    template = templates[int(draw(seed, "wording", f"{task}:{key}") * len(templates))]
    target = target or entry.target_lang or "English"
    values = {"target": target, "label": plain_label(entry.label or ""), "lang": entry.lang or ""}
    prompt, response = fill(template.instruction, values), fill(template.answer, values | {"answer": answer})
    origin = f"{task} template {template.name} on {key}"
    sample = replace(
        entry, id=f"{entry.id}-{task}", task=task, prompt=prompt, response=response, origin=origin
    )
    if entry.recording is None and entry.audio and kind_of(entry.audio)[0] != "file":
        sample.recording = (
            entry.id
        )  # by which splits keep a clip's samples of several tasks together; a file is known by its name
    if task == "translation":
        sample.target_lang = target
    return (
        sample if task == "asr" else chained(sample, chains, chain_share, seed)
    )  # a transcript would be given twice


def chained(sample: Entry, chains: list[Template], share: float, seed: int) -> Entry:
    """The sample as "transcribe, then answer", if it has a transcript and is one of the `share` that are to
    be."""
    key = f"{sample.corpus}/{sample.id}"
    if not sample.text or draw(seed, "chain", key) >= share:
        return sample
    chain = chains[int(draw(seed, "chain wording", key) * len(chains))]
    return replace(
        sample,
        id=f"{sample.id}-chain",
        task="chain",
        prompt=fill(chain.instruction, {"instruction": sample.prompt or ""}).strip(),
        response=fill(CHAIN_ANSWER, {"text": sample.text, "answer": sample.response or ""}),
        origin=f"{sample.origin}, {chain.name}",
    )


_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def text_sample(row: dict, name: str) -> Entry | Rejection:
    """One row of a text-only instruction set, by the names of its fields; chats of one exchange become prompt
    and response."""
    sample_id = str(row.get("id", name))
    turns = row.get("messages") or row.get("conversations")
    if turns:
        try:
            messages = [
                {
                    "role": _ROLES[turn.get("role") or turn["from"]],
                    "content": turn.get("content", turn.get("value")),
                }
                for turn in turns
            ]
            if not all(
                isinstance(turn["content"], str) for turn in messages
            ):  # null: a call of a tool; a list: of parts
                return Rejection(sample_id, "bad_row", f"{name}: a turn whose content is no text")
        except (KeyError, TypeError, AttributeError) as error:
            return Rejection(sample_id, "bad_row", f"{name}: a turn without a known role: {error}")
        if [turn["role"] for turn in messages] == ["user", "assistant"]:
            return Entry(
                id=sample_id, task="text", prompt=messages[0]["content"], response=messages[1]["content"]
            )
        if messages[-1]["role"] != "assistant":
            return Rejection(sample_id, "no_target", f"{name}: the last turn is not the assistant's")
        return Entry(id=sample_id, task="text", messages=messages)
    prompt = row.get("instruction") or row.get("prompt") or row.get("question")
    response = row.get("output") or row.get("response") or row.get("answer")
    if not isinstance(prompt, str) or not isinstance(response, str):
        return Rejection(
            sample_id,
            "no_target",
            f"{name}: neither messages nor instruction/prompt/question with output/response/answer",
        )
    more = row.get("input")
    return Entry(id=sample_id, task="text", prompt=f"{prompt}\n{more}" if more else prompt, response=response)


def read_text_set(path: Path, lang: str | None) -> Iterator[Entry | Rejection]:
    """JSONL, or one JSON list, also compressed. Errors: CorpusError."""
    if not path.exists():
        raise CorpusError(f"{path} does not exist")
    for number, row in json_items(path):
        name = f"{path.stem}-{number:09d}"
        if isinstance(row, Problem):
            yield Rejection(name, row.reason, row.detail, path.stem)
        elif not isinstance(row, dict):
            yield Rejection(name, "bad_json", f"{kind_of_value(row)}, not an object", path.stem)
        else:
            try:
                sample = text_sample(row, name)
            except Exception as error:  # whatever a row holds
                sample = fault_of(error, name)
            sample.corpus = path.stem
            if isinstance(sample, Entry):
                sample.lang, sample.origin = row.get("lang") or lang, f"{path.name}:{number}"
                sample = malformed(sample) or sample
            yield sample


class Voice:
    """A text-to-speech command. `{out}` is the WAV to write; the text is `{text}`, or else comes on standard
    input."""

    def __init__(self, command: str, folder: Path):
        self.command, self.folder = shlex.split(command), folder
        if not any("{out}" in part for part in self.command):
            raise CorpusError(
                f"--tts '{command}' must hold {{out}}, the file to write (and {{text}}, unless it reads "
                f"standard input)"
            )
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str) -> Path:
        """The clip of a text, spoken once: a file that is there is complete. Errors: CorpusError where there
        is no such program; CalledProcessError; FileNotFoundError where it wrote nothing; OSError and
        ValueError for a text that is no argument."""
        name = hashlib.blake2b(json.dumps([self.command, text]).encode(), digest_size=12).hexdigest()
        path = self.folder / f"{name}.wav"
        unfinished = (
            self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}.wav"
        )  # two samples may ask the same at once
        if not path.exists():
            argument = f" {text}" if text.startswith("-") else text  # a program would take it for an option
            command = [
                part.replace("{out}", str(unfinished)).replace("{text}", argument) for part in self.command
            ]
            spoken = None if any("{text}" in part for part in self.command) else text
            try:
                subprocess.run(command, input=spoken, text=True, check=True, capture_output=True)
            except (FileNotFoundError, PermissionError) as error:
                raise CorpusError(f"--tts: {error.filename} cannot be run: {error.strerror}") from None
            os.replace(unfinished, path)
        return path


def speak(entry: Item, voice: Voice) -> Item:
    """A text-only sample of one question with the question spoken: the audio is what the user says."""
    if not isinstance(entry, Entry):
        return entry
    if entry.messages or not entry.prompt:
        return Rejection(
            entry.id, "bad_row", "only samples of one question and one answer are spoken", entry.corpus
        )
    try:
        audio = voice(entry.prompt)
    except FileNotFoundError:
        return Rejection(entry.id, "command_failed", "text to speech wrote no file", entry.corpus)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()
        return Rejection(
            entry.id,
            "command_failed",
            f"text to speech ended with {error.returncode}: {last[-1] if last else 'no message'}",
            entry.corpus,
        )
    except CorpusError:
        raise
    except Exception as error:  # a null byte, a text longer than an argument may be, half a character
        return fault_of(error, entry.id, entry.corpus, "command_failed")
    origin = f"{entry.origin}, spoken by {Path(voice.command[0]).name}"
    return replace(
        entry,
        id=f"{entry.id}-spoken",
        audio=str(audio.absolute()),
        text=entry.prompt,
        prompt=None,
        task="chat",
        origin=origin,
    )


def spoken(
    items: Iterator[Item],
    voice: Voice,
    pool: ThreadPoolExecutor,
    chains: list[Template],
    share: float,
    seed: int,
):
    """speak, several commands at a time, in the order of the set; a share is "transcribe, then
    answer"."""
    while window := list(itertools.islice(items, 256)):
        for item in pool.map(lambda item: speak(item, voice), window):
            yield chained(item, chains, share, seed) if isinstance(item, Entry) else item


def write(items: Iterator[Item], out: Path) -> str:
    """Write the manifest atomically, and beside it what was refused."""
    counts: Counter[str | None] = Counter()  # reasons and tasks
    ignored: Counter[str] = Counter()
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    rejected = out.with_name(out.name + ".rejected.jsonl")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as good, open(rejected, "w", encoding="utf-8") as bad:
            for item in watched(items, out.name):
                if isinstance(item, Ignored):
                    ignored[item.what] += item.count
                    continue
                counts[item.reason if isinstance(item, Rejection) else item.task] += 1
                (bad if isinstance(item, Rejection) else good).write(item.to_json() + "\n")
        os.replace(unfinished, out)
        if not rejected.stat().st_size:
            rejected.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    summary = (
        f"{out}: {', '.join(f'{count:,} {name}' for name, count in sorted(counts.items())) or 'no samples'}"
    )
    return summary + "".join(f"; ignored {count:,} {what}" for what, count in sorted(ignored.items()))


def run(options: argparse.Namespace) -> str:
    if options.command == "wrap":
        templates = load_templates(options.templates or TEMPLATES / f"{options.task}.txt")
        chains = load_templates(options.chain_templates)

        def wrapped(item: Item) -> Item:
            if not isinstance(item, Entry):
                return item
            try:
                sample: Entry | Rejection = wrap(
                    item,
                    options.task,
                    templates,
                    chains,
                    options.chain,
                    options.target,
                    options.seed,
                    options.normalise,
                )
            except Exception as error:  # whatever one sample leads to
                sample = fault_of(error, item.id, item.corpus, "failed")
            return (malformed(sample) if isinstance(sample, Entry) else None) or sample

        items = (wrapped(item) for corpus in open_apart(options.corpus) for item in corpus)
        return write(items, options.out)
    items = (item for path in options.manifest for item in read_text_set(path, options.language))
    if options.command == "text":
        return write(items, options.out)
    voice = Voice(options.tts, options.audio)
    chains = load_templates(options.chain_templates)
    with ThreadPoolExecutor(options.workers) as pool:
        return write(spoken(items, voice, pool, chains, options.chain, options.seed), options.out)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m data_tools.instruct",
        __doc__,
        example="wrap --task asr --corpus manifest:train.jsonl --out instruct.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = (
        wrapping := commands.add_parser("wrap", help="corpora with transcripts, translations or labels")
    ).add_argument
    add(
        "--corpus",
        action="append",
        required=True,
        metavar="NAME:PATH[,option=value]",
        help="corpus to make instructions from, as of data_tools/pack.py; can be given more than once",
    )
    add("--task", required=True, help="asr, translation, emotion, gender, sound, or another with --templates")
    add("--templates", type=Path, help="one instruction a line; default: data_tools/templates/TASK.txt")
    add(
        "--target",
        help="language to translate into, as the instruction names it; default: the corpus' target_lang, or English",  # noqa: E501
    )
    add(
        "--normalise",
        choices=NORMALISERS,
        default="raw",
        help="of transcripts, as pack has it: `sentence` for capitals alone",
    )
    reading = commands.add_parser("text", help="text-only instruction sets")
    speaking = commands.add_parser("speak", help="text-only instruction sets with the question spoken")
    for sub in (reading, speaking):
        sub.add_argument(
            "--manifest",
            action="append",
            type=Path,
            required=True,
            metavar="FILE.jsonl",
            help="text instructions (Alpaca, ShareGPT, messages); repeatable",
        )
        accept_old_name(sub, "--input", "--manifest")
        sub.add_argument("--language", help="of the texts, as en")
        accept_old_name(sub, "--lang", "--language")
    speaking.add_argument(
        "--tts",
        required=True,
        metavar="COMMAND",
        help="'piper -m voice.onnx -f {out}' or 'flite -t {text} -o {out}'",
    )
    speaking.add_argument(
        "--audio",
        type=Path,
        required=True,
        help="folder for the TTS audio; existing files are not made again",
    )
    speaking.add_argument("--workers", type=int, default=os.cpu_count(), help="TTS commands at the same time")
    for sub in (wrapping, speaking):
        sub.add_argument(
            "--chain",
            type=float,
            default=0.0,
            metavar="SHARE",
            help='of the samples: "transcribe, then answer"',
        )
        sub.add_argument(
            "--chain-templates",
            type=Path,
            default=TEMPLATES / "chain.txt",
            help="wordings for --chain, one a line",
        )
        sub.add_argument("--seed", type=int, default=0, help="of the wordings and of the samples for --chain")
    for sub in (wrapping, reading, speaking):
        sub.add_argument("--out", type=Path, required=True, metavar="M.jsonl", help="the manifest to write")
    options = parser.parse_args(argv)
    try:
        print(run(options))
        return 0
    except CorpusError as error:
        print_error("error:", error)
        return 2
    except OutputError as error:
        print_error("error:", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
