"""Real sizes on one machine: the official layout at 9B parameters, and full-width models in training.

    python -m benchmarks.scale_check [--only convert train] [--work DIR] [--out FILE]

    convert   a checkpoint in the official layout, Whisper large-v3 and Llama-3.1-8B, is converted to a model
              folder and back; every tensor must come back equal
    train     Whisper large-v3's and Llama-3.1-8B's widths and vocabulary with 2 layers each: stages 1 to 3 in
              bfloat16, stage 2 stopped by SIGTERM and resumed, then the export

The checkpoint's files are sparse: the first rows of each tensor are random, the rest are holes. Converted
files get holes for their zeros, shard by shard, so that the disk never holds a whole one. Reading holes is
faster than reading a disk: the times are lower bounds.

Marks: convert at most 6 GB of memory, train at most 24 GB (resident, the largest process).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import yaml
from tabulate import tabulate

from benchmarks.machine import keep, machine
from core.command_line import CommandParser

GB = 1e9
CONVERT_LIMIT, TRAIN_LIMIT = 6.0, 24.0  # GB
SHARD_BYTES = 5_000_000_000  # of the checkpoint that is written, as transformers' shards
RANDOM_BYTES = 1 << 20  # of each tensor
WHISPER = dict(
    d_model=1280, encoder_ffn_dim=5120, encoder_attention_heads=20, encoder_layers=32, num_mel_bins=128
)
LLAMA = dict(width=4096, layers=32, heads=32, kv=8, ffn=14336)
VOCABULARY = 128256


def run(command: list[str], stop_when=None) -> dict:
    """Run a command of this project; return its exit code, seconds and largest resident memory in GB.

    stop_when: called until it is true; then the command gets SIGTERM.
    """
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        )
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if stop_when and stop_when():
                process.send_signal(signal.SIGTERM)
                stop_when = None
            time.sleep(0.1)
        seconds, peak = time.monotonic() - began, usage.ru_maxrss * 1024 / GB
        process.returncode = code = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if code not in (0, 85):
            print(log.read().decode(errors="replace")[-3000:], file=sys.stderr)
    row = {"command": " ".join(command[1:3]), "code": code, "seconds": seconds, "memory_gb": peak}
    print(row, file=sys.stderr, flush=True)
    return row


# --- the official layout at true size -----------------------------------------------------------------------


def write_sparse(path: Path, tensors: dict[str, tuple[list[int], int]]) -> None:
    """Write a safetensors file in bfloat16: name -> shape, seed of the first bytes; the rest are holes."""
    import numpy as np

    header, offset, starts = {}, 0, {}
    for name, (shape, _) in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        starts[name] = offset, size
        offset += size
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, seed) in tensors.items():
            start, size = starts[name]
            number = min(RANDOM_BYTES, size) // 2
            values = np.random.default_rng(seed).normal(0, 0.02, number).astype(np.float32)
            file.seek(8 + len(text) + start)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        file.truncate(8 + len(text) + offset)


def write_official(folder: Path) -> float:
    """Write the checkpoint; return its parameters in billions."""
    import torch

    from tests.model.release import ReleasedSoundwave
    from tests.model.test_official import release_tokenizer, released_configs

    words = release_tokenizer()
    config, encoder = released_configs(
        words, **LLAMA, mels=128, encoder_width=WHISPER["d_model"], spare=VOCABULARY - len(words)
    )
    config["torch_dtype"] = "bfloat16"
    encoder |= WHISPER
    with torch.device("meta"):
        state = ReleasedSoundwave(config, encoder).state_dict()
    (folder / "encoder").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "encoder" / "config.json").write_text(json.dumps(encoder))
    words.save_pretrained(folder)
    shards: list[dict] = [{}]
    size = 0
    for seed, (name, tensor) in enumerate(state.items()):
        if size + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = list(tensor.shape), seed
        size += 2 * tensor.numel()
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_sparse(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(tensor.numel() for tensor in state.values()) / 1e9


class Holes:
    """Dig holes into files that a command below `folder` has finished; note the most disk in use."""

    def __init__(self, folder: Path):
        self.folder, self.most, self._done = folder, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Holes:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        sizes: dict[int, tuple[int, int]] = {}  # inode: size and time of the last look
        dug: set[int] = set()
        while not self._done.wait(1.0):
            files = []
            for path in self.folder.rglob("*"):
                try:
                    if path.is_file():
                        files.append((path, path.stat()))
                except FileNotFoundError:  # renamed meanwhile
                    continue
            self.most = max(self.most, sum(512 * found.st_blocks for _, found in files) / GB)
            for path, found in files:
                key, now = found.st_ino, (found.st_size, found.st_mtime_ns)
                settled = sizes.get(key) == now and time.time() - found.st_mtime > 3
                sizes[key] = now
                if settled and key not in dug and 512 * found.st_blocks > 1e8:
                    dug.add(key)
                    subprocess.run(["fallocate", "--dig-holes", str(path)], stderr=subprocess.DEVNULL)


def different(one: Path, other: Path) -> list[str]:
    """Return the names of tensors that the two folders do not share, or that differ."""
    import torch
    from safetensors import safe_open

    from model.pretrained import tensor_files

    places, others = tensor_files(one), tensor_files(other)
    found = sorted(set(places) ^ set(others))
    for name in set(places) & set(others):
        with safe_open(places[name], "pt") as a, safe_open(others[name], "pt") as b:
            if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                found.append(name)
    return found


def convert(work: Path) -> dict:
    official, ours, again = (work / name for name in ("official", "ours", "again"))
    with Holes(work) as disk:
        billions = write_official(official)
        print(f"{billions:.2f}B parameters", file=sys.stderr, flush=True)
        rows = [
            run(["-m", "model.convert", "--from-official", str(official), "--out", str(ours)]),
            run(["-m", "model.convert", "--to-official", str(ours), "--out", str(again)]),
        ]
        for row, name in zip(rows, ("from the official layout", "to the official layout"), strict=True):
            row["command"] = name
        wrong = different(official, again) if all(row["code"] == 0 for row in rows) else ["not compared"]
    return {"billions": billions, "runs": rows, "different": wrong, "most_disk_gb": disk.most}


# --- full-width models --------------------------------------------------------------------------------------


def write_models(folder: Path) -> tuple[str, str]:
    """Whisper large-v3's and Llama-3.1-8B's width and vocabulary, 2 layers each, random, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

    from tests.model.test_official import release_tokenizer

    torch.set_default_dtype(torch.bfloat16)
    whisper = WhisperConfig(
        **{**WHISPER, "encoder_layers": 2}, decoder_layers=1, decoder_ffn_dim=64, vocab_size=40,
        decoder_attention_heads=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    words = release_tokenizer()
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=LLAMA["width"], intermediate_size=LLAMA["ffn"],
        num_hidden_layers=2, num_attention_heads=LLAMA["heads"], num_key_value_heads=LLAMA["kv"],
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(llama)
    model.save_pretrained(folder / "llm")
    words.save_pretrained(folder / "llm")
    torch.set_default_dtype(torch.float32)
    return str(folder / "whisper"), str(folder / "llm")


def train(work: Path) -> dict:
    from tests.train.tiny import STAGES, corpus

    # In a process of its own: what this one held would count beside the runs on the same machine.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        encoder, llm = apart.submit(write_models, work).result()
    corpus(work / "train", 40)
    rows = []
    for number, stage in STAGES.items():
        recipe = {
            "stage": stage,
            "output": str(work / "run"),
            "deepspeed": f"ds_configs/zero{number}.json",
            "model": {"encoder": {"name": encoder}, "llm": {"name": llm}, "dtype": "bfloat16"},
            "data": {
                "train": [{"shards": str(work / "train")}],
                "batch_seconds": 6.0,
                "micro_batch_seconds": 3.0,
                "micro_batch_tokens": 512,
                "max_seconds": 3.0,
                "workers": 1,
            },
            "optim": {"steps": 4, "warmup_steps": 1},
            "checkpoint": {"every_steps": 2, "keep_last": 1, "keep_best": False},
            "log": {"every_steps": 1, "trackers": []},
        }
        path = work / f"stage{number}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        metrics = work / "run" / stage / "metrics.jsonl"

        def one_step(metrics: Path = metrics) -> bool:
            return metrics.exists() and '"kind": "train"' in metrics.read_text()

        if stage == "shrinking":
            rows.append(run(["-m", "train.run", str(path)], stop_when=one_step))
            rows[-1]["command"] = f"stage {number}, stopped"
        rows.append(run(["-m", "train.run", str(path)]))
        rows[-1]["command"] = f"stage {number}" + (", resumed" if stage == "shrinking" else "")
    rows.append(
        run(["-m", "model.export", str(work / "run" / "sft"), "--out", str(work / "export"), "--merge"])
    )
    rows[-1]["command"] = "export, LoRA merged"
    return {"runs": rows}


# --- report -------------------------------------------------------------------------------------------------


def problems(report: dict) -> list[str]:
    found = []
    for part, limit in (("convert", CONVERT_LIMIT), ("train", TRAIN_LIMIT)):
        for row in report.get(part, {}).get("runs", []):
            expected = 85 if row["command"].endswith("stopped") else 0
            if row["code"] != expected:
                found.append(f"{row['command']}: exit code {row['code']}")
            if row["memory_gb"] > limit:
                found.append(f"{row['command']}: {row['memory_gb']:.1f} GB, at most {limit:g}")
    if report.get("convert", {}).get("different"):
        found.append(f"tensors that differ: {', '.join(report['convert']['different'][:5])}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m benchmarks.scale_check", __doc__.splitlines()[0], example="--only convert"
    )
    parser.add_argument("--only", choices=("convert", "train"), help="one of the two parts")
    parser.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/scale_check.json"),
        help="where the report goes, its table beside it (.txt)",
    )
    options = parser.parse_args(argv)
    if shutil.which("fallocate") is None:
        print("error: the program fallocate is not installed (package util-linux)", file=sys.stderr)
        return 2
    report: dict = {"machine": machine()}
    for part, check in (("convert", convert), ("train", train)):
        if options.only in (None, part):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                report[part] = check(Path(folder))
    rows = [row for part in ("convert", "train") for row in report.get(part, {}).get("runs", [])]
    table = tabulate(
        [(row["command"], row["code"], row["seconds"], row["memory_gb"]) for row in rows],
        headers=("", "exit code", "seconds", "memory, GB"),
        floatfmt=".1f",
    )
    lines = []
    if "convert" in report:
        found = report["convert"]
        equal = "equal" if not found["different"] else "NOT equal"
        lines.append(
            f"official layout: {found['billions']:.2f}B parameters, sparse files, tensors after both "
            f"conversions {equal}; most disk {found['most_disk_gb']:.1f} GB"
        )
    misses = problems(report)
    lines += [f"missed: {miss}" for miss in misses] or ["all marks are reached"]
    text = table + "\n\n" + "\n".join(lines)
    print(text)
    keep(options.out, report, text)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
