"""Make the golden artefacts with the code of an earlier commit: `python tests/golden/make.py CHECKOUT TARGET`.

Run it with that checkout's own environment (README.md). It uses only what both versions have, so that the same file
also computes the outputs of a model folder for the test.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

STAGES = {1: "alignment", 2: "shrinking", 3: "sft"}
STEPS, SAVED_AT = 4, 2  # of each stage; of the checkpoint that is kept
TEXTS = ("hi", "the", "a b", "ho", "all", "we")


def instruction_set() -> str:
    """Return what decides the last bits of a result on this machine: its vector instructions and PyTorch."""
    import torch

    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.split() for key, value in facts.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    found = [flag for flag in wanted if flag in facts.get("flags", ())]
    vendor = " ".join(facts.get("vendor_id", ["unknown"]))
    version = torch.__version__.partition("+")[0]
    return f"{torch.backends.cpu.get_cpu_capability()}, {vendor}, {' '.join(found)}, PyTorch {version}"


def tone(seconds: float, number: int):
    """Return float32 samples at 16 kHz of one sine wave."""
    import numpy as np

    time = np.arange(round(seconds * 16000)) / 16000
    return (0.3 * np.sin(2 * np.pi * (150 + 60 * number) * time)).astype(np.float32)


def outputs(folder: Path) -> dict:
    """Return what a model folder computes for two tones: its loss sums, and what it writes."""
    import torch

    from model import artifact
    from tests.model import tiny

    model = artifact.load(folder).eval()
    chats = [tiny.chat("Say it.", "hi"), tiny.chat("Say it.", "the")]
    sounds = [torch.from_numpy(tone(seconds, number)) for number, seconds in enumerate((0.5, 0.8))]
    losses = ("ctc",) if model.llm is None else ("ce", "ctc")
    with torch.no_grad():
        batch = tiny.batch_of(model, chats, sounds, ["hi", "the"])
        found = model(batch, losses=losses)
        result = {"ctc_sum": float(found.ctc_sum), "transcripts": model.ctc_greedy(batch)}
        if model.llm is not None:
            prompts = tiny.batch_of(model, [chat[:1] for chat in chats], sounds, ["hi", "the"], left=True)
            result |= {"ce_sum": float(found.ce_sum), "generated": model.generate(prompts, max_new_tokens=6)}
    return result


def write_corpus(folder: Path) -> None:
    """Pack eight clips and two text-only turns."""
    import io

    import soundfile

    from data_tools.shards import ShardWriter, write_index

    folder.mkdir()
    writer = ShardWriter(folder / "golden-000000.tar")
    for number in range(10):
        entry = {
            "id": f"golden-{number}",
            "corpus": "golden",
            "task": "asr",
            "text": TEXTS[number % len(TEXTS)],
            "lang": "en",
            "duration": None,
            "sample_rate": 16000,
        }
        audio = None
        if number % 5 == 4:
            entry |= {"task": "text", "text": None, "prompt": "What is two and two?", "response": "Four."}
        else:
            seconds = 0.4 + 0.05 * number
            entry["duration"] = seconds
            if number % 5 == 3:
                entry |= {"task": "translation", "prompt": "To French.", "response": "oui"}
            file = io.BytesIO()
            soundfile.write(file, tone(seconds, number), 16000, format="FLAC")
            audio = file.getvalue()
        writer.add(f"{number:09d}", audio, "flac" if audio else "", entry)
    write_index(folder, "golden", [writer.close("golden-000000.tar")])


def write_recipes() -> None:
    """Write one recipe per stage; all paths are relative to the folder of the artefacts."""
    import yaml

    for number, stage in STAGES.items():
        recipe = {
            "stage": stage,
            "output": "run",
            "seed": 1,
            "deepspeed": "ds_configs/zero3.json",
            "model": {"encoder": {"name": "whisper"}, "llm": {"name": "llm", "lora_r": 2}},
            "data": {
                "train": [{"shards": "shards"}],
                "valid": [{"shards": "shards"}],
                "batch_seconds": 3.0,
                "micro_batch_seconds": 1.0,
                "workers": 0,
            },
            "optim": {"steps": STEPS, "warmup_steps": 2},
            "checkpoint": {"every_steps": SAVED_AT, "keep_last": 3},
            "log": {"every_steps": 1, "validate_every_steps": 2, "tensorboard": False},
        }
        Path(f"stage{number}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def train(number: int) -> None:
    """Train one stage on two ranks in this folder."""
    import socket
    import subprocess

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment = {
            **os.environ,
            **{key: str(value) for key, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": sys.path[0],
        }
        ranks.append(
            subprocess.Popen([sys.executable, "-m", "train.run", f"stage{number}.yaml"], env=environment)
        )
    codes = [process.wait() for process in ranks]
    if codes != [0, 0]:
        raise SystemExit(f"stage {number} ended with {codes}")


def curves(stage_folder: Path) -> dict:
    """Return the numbers of metrics.jsonl that do not depend on time, in full precision."""
    lines = [json.loads(line) for line in (stage_folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "ce", "ctc", "grad_norm", "shrink_ratio", "wer", "cer")
    return {
        kind: [{key: line[key] for key in keys if key in line} for line in lines if line["kind"] == kind]
        for kind in ("train", "valid")
    }


def main(checkout: Path, target: Path) -> None:
    sys.path[0] = str(checkout.resolve())
    import torch

    from tests.model import tiny

    target.mkdir(parents=True)
    os.chdir(target)
    torch.manual_seed(0)
    tiny.whisper(Path("whisper"), width=8, layers=1, heads=2, mels=8, positions=64)
    tiny.llm(Path("llm"), width=16, layers=1, heads=2)
    write_corpus(Path("shards"))
    write_recipes()
    losses, wanted = {}, {}
    for number, stage in STAGES.items():
        train(number)
        losses[stage] = curves(Path("run") / stage)
        wanted[stage] = outputs(Path("run") / stage / "model")
    facts = {
        "commit": os.environ["GOLDEN_COMMIT"],
        "instruction_set": instruction_set(),
        "ranks": 2,
        "threads": 1,
    }
    Path("losses.json").write_text(json.dumps({**facts, "stages": losses}, indent=1) + "\n")
    Path("outputs.json").write_text(json.dumps({**facts, "stages": wanted}, indent=1) + "\n")
    # Kept: the three model folders, and one checkpoint of stage 2.
    for stage in STAGES.values():
        for path in (Path("run") / stage).iterdir():
            if path.name not in ("model", "checkpoints"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (Path("run") / stage / "checkpoints").iterdir():
            if stage != "shrinking" or path.name != f"step-{SAVED_AT:06d}":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
