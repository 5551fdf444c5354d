"""Write a model's predictions for packed folders, and score them.

    python -m evaluation.run --model runs/demo/alignment/model --shards shards/dialogues-test --task asr
    torchrun --nproc_per_node 8 -m evaluation.run --model ... --shards shards/test-a shards/test-b --task asr
    translation

A stage 1 folder is decoded by its CTC head (greedy, no LLM is loaded), folders of stages 2 and 3 by
generation. In place of --model, --untrained RECIPE scores a stage's model before its first step. Every batch
is on disk before the next one starts (with --backend vllm: as soon as it is answered); the same command
resumes after a kill.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from core.command_line import CommandParser
from core.console import OneLine
from core.decode_names import FORMER_DECODES, decode_name
from core.distributed import disconnect, from_main, gather, hard_exit
from core.object_store import folder_name, is_store_url, joined
from core.plugins import PluginError, add_plugins_option, load_plugins
from core.samples import question_of, transcript_of
from data_tools.shards import ShardError, ShardIndex
from evaluation.predictions import PredictionError, PredictionFile, read_rows, row_key
from evaluation.score import print_notes, score_file, table
from evaluation.tasks import lettered_choices, reference_of
from model import artifact
from model.batch import Batch
from model.generation.drafted import Drafting
from model.generation.joint import JointSearch
from model.pretrained import SourceError
from model.soundwave import Soundwave
from model.stages import ALIGNMENT, STAGES
from recipe.config import DataConfig, Recipe, RecipeError, load_recipe
from recipe.stages import initial_folder, stage_of
from soundwave.decoding import (
    DECODES,
    Decode,
    Decoded,
    Decoding,
    begin_batch,
    decode_batch,
)
from soundwave.vllm import VLLM, BackendError
from soundwave.vllm import start as start_vllm
from stream import EvalStream

DECODE_HELP = (
    "default: ctc for stage 1, greedy for stages 2 and 3; drafted: the answers of greedy, faster: the LLM "
    "checks the CTC head's transcript; joint: beam search by LLM and CTC head, transcripts only"
)


class InputError(OneLine, ValueError):
    """A command that cannot be run; one line: what, where, what to do."""


def folder_digest(path: Path) -> str:
    """sha256 over the files of a model folder that decide what it answers."""
    digest = hashlib.sha256()
    files = ("soundwave.json", "adapters.safetensors", "lora/adapter_model.safetensors")
    for name in (*files, *artifact.TUNED.values()):
        file = path / name
        if file.exists():
            digest.update(name.encode())
            with file.open("rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def shard_folder(shards: str, split: str | None) -> Path | str:
    """`--shards`, or its sub-folder named by `--split`; a URL stays one. Errors: InputError where there is no
    such folder."""
    if is_store_url(shards):
        return joined(shards, split) if split else shards
    path = Path(shards) / split if split else Path(shards)
    if not (path / "index.json").exists():
        splits = sorted(p.parent.name for p in Path(shards).glob("*/index.json"))
        hint = (
            f"; packed folders in {shards}: {', '.join(splits)} (choose one with --split)" if splits else ""
        )
        raise InputError(
            f"{path} holds no index.json{hint or ': give a folder written by data_tools/pack.py'}"
        )
    return path


def joint_search(options: argparse.Namespace) -> JointSearch:
    """The search of `--decode joint`; the text that CTC was taught is the trained or the untrained
    recipe's."""
    if options.model:
        ctc_text = artifact.trained_with(artifact.describe(options.model)).get(
            "ctc_text", DataConfig.ctc_text
        )
    else:
        ctc_text = load_recipe(options.untrained, options.overrides).data.ctc_text
    return JointSearch(options.ctc_weight, options.beams, token_bonus=options.token_bonus, ctc_text=ctc_text)


def drafting(options: argparse.Namespace) -> Drafting:
    """The options of `--decode drafted`."""
    return Drafting(options.draft_tokens, options.draft_ratio)


def begin(recipe: Recipe, decode: str | None) -> tuple[Soundwave, str]:
    """The recipe's model as its stage begins, and the stage: what the previous stage has learnt, the rest
    fresh from the recipe's seed. Stage 1 and CTC need no LLM. Errors: RecipeError, SourceError,
    FolderError."""
    previous = initial_folder(recipe)
    parts = ("encoder", "adapters") if decode == "ctc" else stage_of(recipe).parts
    torch.manual_seed(recipe.seed)
    model = Soundwave.build(recipe.model, parts=parts, starts_lora=False)
    taken = artifact.load_trained(model, previous) if previous else []
    if "lora" not in taken:
        model.start_lora()
    return model, ALIGNMENT.name if decode == "ctc" else recipe.stage


def prediction_row(sample: dict, prediction: str, raw: str, decode: str) -> dict:
    """What is kept of one answer: enough to score it again without the audio."""
    row = {
        "id": sample["id"],
        "corpus": sample.get("corpus"),
        "task": "asr" if decode == "ctc" else sample.get("task"),
        "lang": sample.get("lang"),
        "duration": sample.get("duration"),
        "reference": transcript_of(sample) if decode == "ctc" else reference_of(sample),
        "prediction": prediction.strip(),
        "raw": raw,
    }
    if decode != "ctc":
        row |= {key: sample[key] for key in ("label", "target_lang") if sample.get(key) is not None}
        if question := question_of(sample):
            row["prompt"] = question
        if sample.get("text") and sample.get("task") != "asr":
            row["transcript"] = sample["text"]  # the judge's description of the audio
        choices = lettered_choices(question)
        row |= {"choices": choices} if choices and sample.get("label") else {}
    if sample.get("findings"):
        row["findings"] = sample["findings"]
    return row


def audio_lengths(model: Soundwave, batch: Batch) -> list[dict]:
    """Per row of the last batch: `frames` of the adapter and `kept` frames, summed over the row's audios; {}
    without audio."""
    if batch.audio_is_dummy:
        return [{} for _ in batch.ids]
    counts = (
        (batch.input_ids == model.audio_id).sum(dim=1).tolist()
        if batch.input_ids.shape[1]
        else [1] * len(batch.ids)
    )
    frames, kept = (lengths.tolist() for lengths in model.lengths_of_last_batch)
    rows, place = [], 0
    for count in counts:
        span = slice(place, place + count)
        rows.append({"frames": sum(frames[span]), "kept": sum(kept[span])} if count else {})
        place += count
    return rows


@dataclass
class Started:
    """A batch whose answers are awaited."""

    samples: list[dict]
    rejected: list[dict]  # samples that could not be read before it
    lengths: list[dict]
    began: float
    answers: Callable[[], list[Decoded]]


def is_done(done: set[str], sample: dict) -> bool:
    return row_key(sample) in done


@torch.inference_mode()
def predict(
    model: Soundwave,
    stream: EvalStream,
    file: PredictionFile,
    options: argparse.Namespace,
    decode: str,
    vllm: VLLM | None = None,
) -> None:
    """Answer every batch of the stream and append it to the file. A batch without samples fills up a shorter
    rank: no answer. With vLLM, batches are encoded while it answers earlier ones. Errors: BackendError."""
    decoding = Decoding(
        cast(Decode, decode),  # a choice of --decode
        options.max_new_tokens,
        joint_search(options) if decode == "joint" else None,
        options.sample,
        options.temperature,
        options.top_p,
        drafting(options) if decode == "drafted" else None,
    )
    device = next(model.parameters()).device
    reported, ended = 0, 0.0
    started: deque[Started] = deque()

    def write_first() -> None:
        nonlocal ended
        first = started.popleft()
        decoded = first.answers()
        began, ended = max(first.began, ended), time.perf_counter()
        write_answers(file, first, decoded, decode, (ended - began) / len(first.samples))
        progress.update(len(first.samples))

    with tqdm(
        total=stream.total, desc=f"{decode} {file.path.stem}", unit="utt", disable=file.rank != 0
    ) as progress:
        for batch, samples in stream:
            rejected, reported = stream.rejected[reported:], len(stream.rejected)
            if not samples:  # no rank waits for another here
                file.append([], rejected)
                continue
            began = time.perf_counter()
            batch = batch.to(device)
            if vllm is None:
                decoded = decode_batch(model, batch, decoding)
                answers: Callable[[], list[Decoded]] = partial(list, decoded)
            else:
                answers = begin_batch(model, batch, decoding, vllm)
            started.append(Started(samples, rejected, audio_lengths(model, batch), began, answers))
            while started and (vllm is None or sum(len(one.samples) for one in started) > vllm.rows):
                write_first()
        while started:
            write_first()
    file.append([], stream.rejected[reported:])  # of a stream without batches


def write_answers(
    file: PredictionFile, batch: Started, decoded: list[Decoded], decode: str, wall: float
) -> None:
    """Append a batch's answers to the file. wall: seconds that one took."""
    rows, rejected = [], list(batch.rejected)
    for sample, answer, lengths in zip(batch.samples, decoded, batch.lengths, strict=True):
        if answer.unanswered is not None:
            rejected.append({"id": sample["id"], "corpus": sample.get("corpus"), "why": answer.unanswered})
            continue
        row = prediction_row(sample, answer.text, answer.raw, decode)
        row["wall"] = round(wall, 4)
        if answer.tokens is not None:
            row["tokens"] = answer.tokens
        if answer.passes is not None:
            row["passes"] = answer.passes
        rows.append(row | lengths)
    file.append(rows, rejected)


@dataclass
class TestSet:
    """One of the folders to answer, which of its tasks, and what its predictions depend on."""

    shards: Path | str
    tasks: list[str] | None  # None: all
    settings: dict


def check_inputs(options: argparse.Namespace) -> list[TestSet]:
    """No model is loaded. Errors: InputError, ShardError, RecipeError."""
    folders = [shard_folder(shards, options.split) for shards in options.shards]
    if len({folder_name(path) for path in folders}) < len(folders):
        raise InputError(
            "--shards: two folders of the same name would write to the same file: score them one after the "
            "other"
        )
    if options.out and len(folders) > 1 and options.out.suffix:
        raise InputError(
            f"--out {options.out} is one file for {len(folders)} folders: name a folder, where each has its "
            f"own"
        )
    if options.model and not (options.model / "soundwave.json").exists():
        raise InputError(
            f"{options.model} holds no soundwave.json: give a model folder, e.g. <output>/<stage>/model"
        )
    if options.model:
        model: str | dict[str, Any] = folder_digest(options.model)
    else:
        recipe = load_recipe(options.untrained, options.overrides)
        previous = initial_folder(recipe)
        model = {
            "untrained": asdict(recipe.model),
            "stage": recipe.stage,
            "seed": recipe.seed,
            "previous": folder_digest(previous) if previous else None,
        }
    indexes = [ShardIndex.load(path) for path in folders]
    requested = None if "all" in options.task else set(options.task)
    available = sorted({task for index in indexes for task in index.tasks})
    for task in sorted((requested or set()) - set(available)):
        raise InputError(
            f"{' '.join(map(str, folders))}: no task '{task}': give --task {' or '.join(available)}, or "
            f"--task all"
        )
    sets = []
    for path, index in zip(folders, indexes, strict=True):
        tasks = None if requested is None else sorted(requested & set(index.tasks))
        if tasks == []:
            raise InputError(f"{path} has none of the tasks asked for: it has {', '.join(index.tasks)}")
        sets.append(
            TestSet(
                path,
                tasks,
                {
                    "shards": index.fingerprint,
                    "tasks": tasks,
                    "limit": options.limit,
                    "max_new_tokens": options.max_new_tokens,
                    "sampling": [options.temperature, options.top_p, options.seed]
                    if options.sample
                    else None,
                    "model": model,
                    **(
                        {"joint": [options.ctc_weight, options.beams, options.token_bonus]}
                        if options.decode == "joint"
                        else {}
                    ),
                    **({"backend": options.backend} if options.backend != "torch" else {}),
                    **(
                        {"drafted": options.draft_ratio}
                        if options.decode == "drafted" and options.draft_ratio < 1
                        else {}
                    ),
                },
            )
        )
    return sets


def load(options: argparse.Namespace, device: torch.device) -> tuple[Soundwave, str]:
    """The model on its device, and its decode (ctc | greedy | drafted | joint)."""
    if options.untrained:
        model, stage = begin(load_recipe(options.untrained, options.overrides), options.decode)
    else:
        model = artifact.load(options.model, with_llm=options.decode != "ctc")
        stage = model.stage
    has_llm = STAGES[stage].needs_llm
    if options.decode not in (None, "ctc") and not has_llm:
        raise InputError(
            f"{options.model or options.untrained} is of stage 1, which has no LLM: use --decode ctc, or the "
            f"folder "
            "of a later stage"
        )
    return model.to(device).eval(), options.decode or ("greedy" if has_llm else "ctc")


def output_file(options: argparse.Namespace, test: TestSet) -> Path:
    if options.out and len(options.shards) == 1 and options.out.suffix:
        return options.out
    place = (
        options.out or (options.model or Path("evaluations") / Path(options.untrained).stem) / "evaluation"
    )
    backend = [] if options.backend == "torch" else [options.backend]

    def file(decode: str | None) -> Path:
        names = [folder_name(test.shards), *(test.tasks or ["all"]), *([decode] if decode else []), *backend]
        return place / f"{'-'.join(names)}.jsonl"

    former = [file(old) for old, new in FORMER_DECODES.items() if new == options.decode]
    begun = [path for path in former if path.with_suffix(".run.json").exists()]
    return file(options.decode) if file(options.decode).exists() or not begun else begun[0]


@dataclass
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    def stop(self, error: str | None) -> bool:
        """Whether any rank met an error; rank 0 prints the first one, and all ranks know, so that they stop
        together."""
        first = next((reason for reason in gather(error) if reason), None)
        if first and self.rank == 0:
            print(f"error: {first}", file=sys.stderr)
        return first is not None


def start(device: str | None) -> Ranks:
    """Ranks from the launcher's environment (one process without), joined by gloo; the answers themselves go
    through files."""
    disable_progress_bar()  # of transformers' weight loading; tqdm shows what takes long
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        # A rank may wait for a slower one as long as the work takes, not for torch's half hour.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return Ranks(rank, world_size, torch.device(device or default))


def clip_notes(rows: list[dict], trained_seconds: float | None) -> list[str]:
    """Notes about the clips that were answered: findings of decoding, and those longer than any
    that the model was trained on."""
    notes = []
    odd = [row for row in rows if row.get("findings")]
    if odd:
        first = f"{odd[0]['id']}: {'; '.join(odd[0]['findings'])}"
        notes.append(
            f"{len(odd)} clips may not be what they should be ({first}): see `findings` in the predictions"
        )
    if trained_seconds is not None and (
        long := sum((row.get("duration") or 0) > 1.01 * trained_seconds for row in rows)
    ):
        notes.append(
            f"{long} clips are longer than {trained_seconds:g} s, the longest of training "
            f"(data.max_seconds): answers "
            "may be wrong or stop early"
        )
    return notes


def finish(
    file: PredictionFile, place: Ranks, longest: int | None = None, trained_seconds: float | None = None
) -> bool:
    """Wait for all ranks, merge, score, print. longest: tokens at which an answer was cut. trained_seconds:
    of the longest clip in training. False where there is nothing to score: rank 0 has said why."""
    if place.world_size > 1:
        dist.barrier()
    error = None
    if place.rank == 0:
        file.merge()
        try:
            result = score_file(file.path)
            print(table(result["tasks"]))
            print_notes(result)
            rows = read_rows(file.path)
            for note in clip_notes(rows, trained_seconds):
                print(f"note: {note}")
            if longest and (cut := sum(row.get("tokens", 0) >= longest for row in rows)):
                print(f"{cut} answers were cut at --max-new-tokens {longest}")
            print(
                f"predictions: {file.path} ({result['utterances']} answered, {result['rejected']} rejected)"
            )
            print(f"scores: {file.path.with_suffix('.scores.json')}")
        except PredictionError as problem:
            error = str(problem)
    return not place.stop(error)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "python -m evaluation.run",
        __doc__.splitlines()[0],
        example="--model runs/me/sft/model --shards shards/test --task asr --out predictions.jsonl",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="model folder written by a stage: <output>/<stage>/model")
    source.add_argument(
        "--untrained", metavar="RECIPE", help="the recipe's model as its stage begins: the score before"
    )
    parser.add_argument(
        "--shards", nargs="+", required=True, help="one or more folders written by data_tools/pack.py"
    )
    parser.add_argument("--split", help="sub-folder of each --shards")
    parser.add_argument(
        "--task",
        nargs="+",
        default=["asr"],
        help="tasks to answer, each where a folder has it, or all (default: asr)",
    )
    parser.add_argument(
        "--decode",
        choices=DECODES,
        type=decode_name,
        help=DECODE_HELP,
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=Drafting.longest,
        help="draft tokens that drafted checks in one pass at most (default: %(default)s)",
    )
    parser.add_argument(
        "--draft-ratio",
        type=float,
        default=Drafting.minimum_ratio,
        help="drafted accepts a token of at least this share of the best one's probability; below 1, answers "
        "differ from greedy ones (default: %(default)s)",
    )
    parser.add_argument(
        "--beams", type=int, default=JointSearch.beams, help="hypotheses of joint (default: %(default)s)"
    )
    parser.add_argument(
        "--ctc-weight",
        type=float,
        default=JointSearch.weight,
        help="of CTC's log-probability beside the LLM's in joint (default: %(default)s)",
    )
    parser.add_argument(
        "--token-bonus",
        type=float,
        default=JointSearch.token_bonus,
        help="added in joint for each token of the text, against words left out (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=["torch", "vllm"],
        default="torch",
        help="what runs the LLM: vllm for the greedy answers of stages 2 and 3 (make setup-vllm; "
        "default: torch)",
    )
    parser.add_argument(
        "--vllm-python",
        type=Path,
        metavar="FILE",
        help="Python of vLLM's environment (default: .venv-vllm/bin/python)",
    )
    parser.add_argument(
        "--vllm-rows", type=int, default=64, help="clips that vLLM answers at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="only this many utterances, evenly spaced, of each folder")
    parser.add_argument(
        "--batch-seconds", type=float, default=60.0, help="padded audio seconds in a batch (default: 60)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read and decode ahead (default: 2)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, help="longer answers are cut (default: %(default)s)"
    )
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy search")
    parser.add_argument("--temperature", type=float, default=0.2, help="with --sample")
    parser.add_argument("--top-p", type=float, default=0.9, help="with --sample")
    parser.add_argument("--seed", type=int, default=0, help="with --sample")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--out",
        type=Path,
        help="predictions file, or a folder for <shards>-<task>[-<decode>].jsonl of each "
        "folder (default: <model>/evaluation)",
    )
    parser.add_argument("--restart", action="store_true", help="throw away what --out already holds")
    add_plugins_option(parser)
    parser.add_argument("overrides", nargs="*", help="key=value for the recipe of --untrained")
    options = parser.parse_args(arguments)
    if options.overrides and not options.untrained:
        parser.error(f"'{options.overrides[0]}': key=value goes with --untrained RECIPE only")
    if not 0 < options.draft_ratio <= 1:
        parser.error("--draft-ratio must be in (0, 1]")
    if options.decode == "drafted" and options.sample:
        parser.error("--decode drafted is greedy: without --sample")
    for name in ("beams", "draft_tokens", "max_new_tokens", "vllm_rows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.backend == "vllm":
        if options.untrained:
            parser.error("--backend vllm needs --model: it merges the folder's LoRA into the LLM")
        if options.decode not in (None, "greedy") or options.sample:
            parser.error("--backend vllm decodes greedily: --decode greedy, without --sample")
    elif options.vllm_python:
        parser.error("--vllm-python needs --backend vllm")
    if options.decode == "joint" and options.sample:
        parser.error("--decode joint is a beam search: without --sample")
    if options.decode == "joint" and options.task != ["asr"]:
        parser.error("--decode joint writes transcripts: with --task asr alone")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    place = start(options.device)
    error, files, vllm = None, [], None
    try:
        load_plugins(options.plugins)
        tests = check_inputs(options)
        model, decode = load(options, place.device)
        for test in tests:
            path, settings = output_file(options, test), test.settings | {"decode": decode}
            files.append(PredictionFile(path, settings, place.rank, options.restart))
            if place.rank == 0:
                files[-1].prepare()
    except (
        InputError,
        PluginError,
        PredictionError,
        RecipeError,
        ShardError,
        artifact.FolderError,
        SourceError,
    ) as problem:
        error = str(problem)
    if place.stop(error):
        return 2
    try:
        if options.backend == "vllm":
            vllm = start_vllm(model, options.model, rows=options.vllm_rows, python=options.vllm_python)
    except (BackendError, artifact.FolderError, SourceError) as problem:
        error = str(problem)
    try:
        return 2 if place.stop(error) else score(options, place, model, decode, tests, files, vllm)
    finally:
        if vllm is not None:
            vllm.close()


def score(
    options: argparse.Namespace,
    place: Ranks,
    model: Soundwave,
    decode: str,
    tests: list[TestSet],
    files: list[PredictionFile],
    vllm: VLLM | None,
) -> int:
    """Answer and score each folder. Returns the exit code."""
    stage = ALIGNMENT.name if decode == "ctc" else model.stage  # what a batch needs to hold
    for test, file in zip(tests, files, strict=True):
        torch.manual_seed(options.seed + place.rank)
        # One list for all: a slower rank would find the faster one's first rows in it.
        done = from_main(file.done() if place.rank == 0 else set())
        stream = EvalStream(
            str(test.shards),
            model.tokenizer,
            model.config,
            stage,
            tasks=test.tasks,
            limit=options.limit,
            done=partial(is_done, done),
            batch_seconds=options.batch_seconds,
            rank=place.rank,
            world_size=place.world_size,
            data=DataConfig(workers=options.workers),
        )
        error = None
        try:
            predict(model, stream, file, options, decode, vllm)
        except BackendError as problem:
            error = f"{problem}: run the same command again to continue"
        if place.stop(error):
            return 2
        if not finish(file, place, options.max_new_tokens, model.trained_seconds):
            return 2
    return 0


if __name__ == "__main__":
    code = main()
    disconnect()
    hard_exit(code)
