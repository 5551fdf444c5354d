"""Run every test and benchmark that needs a CUDA GPU, the most telling ones first.

    python -m benchmarks.gpu_check [--again] [--out FILE]

Each item is a process with a time limit of its own, which is killed when it is over. Results are written
after each item; the same command continues with the items that are not done yet on this GPU and commit. What
is not installed is skipped by name. One JSON, one table; exit code 1 if an item failed.

The first five minutes: parity and speed of the op, look-back attention through FlashAttention and through
PyTorch, a packed step of stage 2, generation. Then training with a kill and a resume, the op at all sizes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.machine import keep
from core.command_line import CommandParser, accept_old_name

ROOT = Path(__file__).resolve().parent.parent
WANTED = ("triton", "transformers", "peft", "deepspeed", "flash_attn", "hypothesis", "pytest")


@dataclass(frozen=True)
class Item:
    """A part of the check. seconds: its limit; work: returns its rows."""

    name: str
    seconds: float
    work: Callable[[], list[dict]]


def run_tests(file: str) -> list[dict]:
    """Run a file's GPU tests; one row a test: name, outcome (passed, skipped, failed), seconds, and why."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return [{"check": file, "outcome": "skipped", "why": "pytest or hypothesis is not installed"}]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", str(ROOT / file)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if not report.exists():
            return [{"check": file, "outcome": "failed", "why": "pytest has written no report"}]
        rows = []
        for case in xml.parse(report).iter("testcase"):
            found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if found is None else "skipped" if found.tag == "skipped" else "failed"
            rows.append(
                {
                    "check": f"{case.get('classname', '')}.{case.get('name')}",
                    "outcome": outcome,
                    "seconds": float(case.get("time", 0)),
                    "why": "" if found is None else (found.get("message") or "")[:300],
                }
            )
        return rows


def linear_ctc(full: bool) -> list[dict]:
    if importlib.util.find_spec("triton") is None:
        return [{"check": "benchmark linear_ctc", "outcome": "skipped", "why": "triton is not installed"}]
    from benchmarks.linear_ctc import run

    report = run("cuda", [torch.bfloat16], full=full, repeats=5 if full else 2, memory=full)
    rows = []
    for row in report["rows"]:
        reached = row.get("mark") is None or row["ratio"] <= row["mark"]
        mark = (
            ""
            if row.get("mark") is None
            else f", mark {row['mark']:.2f} {'reached' if reached else 'MISSED'}"
        )
        rows.append(
            {
                "check": f"{row['what']} {row['B,T,D,V']} {row['posteriors']}",
                "outcome": "measured",
                "seconds": row["seconds"],
                "why": f"ratio {row['ratio']:.3f}{mark}",
            }
        )
    return rows


def lookback() -> list[dict]:
    """Forward and backward of 60 CTC peaks over 750, 32 heads of 128, 8 utterances, bfloat16."""
    from model.ops import lookback as module

    query, key, value = (
        torch.randn(8, length, 32, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for length in (60, 750, 750)
    )
    kept, frames = torch.full((8,), 60, device="cuda"), torch.full((8,), 750, device="cuda")
    rows, flash = [], module.flash_attn_varlen_func
    for name, function in (("FlashAttention", flash), ("PyTorch", None)):
        if name == "FlashAttention" and flash is None:
            rows.append(
                {
                    "check": f"look-back through {name}",
                    "outcome": "skipped",
                    "why": "flash-attn is not installed",
                }
            )
            continue
        module.flash_attn_varlen_func = function
        try:
            for timed in range(20):
                if timed == 10:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                module.lookback_attention(query, key, value, kept, frames).sum().backward()
            torch.cuda.synchronize()
        finally:
            module.flash_attn_varlen_func = flash
        seconds = (time.perf_counter() - start) / 10
        rows.append(
            {"check": f"look-back through {name}", "outcome": "measured", "seconds": seconds, "why": ""}
        )
    return rows


def packed_step(width: int = 2048, layers: int = 8, steps: int = 5) -> list[dict]:
    """Steps of stage 2 with rows joined: seconds, peak memory and the planner's value. Random models."""
    from benchmarks.memory_model import Case, write_recipe
    from core.distributed import connect, fill_environment
    from model.soundwave import Soundwave
    from recipe.config import load_recipe
    from recipe.stages import stage_of
    from stream import worst_case_batch
    from train.dry_run import meta_model
    from train.engine import Engine
    from train.planner import Planner
    from train.setup import resolve_sizes
    from train.telemetry import peak_memory

    case = Case("packed step", "shrinking", 2, "bfloat16", width, layers, True, 60.0, 4096, vocabulary=32000)
    fill_environment()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(write_recipe(case, Path(folder)), [])
        ranks = connect()
        torch.manual_seed(0)
        stage = stage_of(recipe)
        config, _ = resolve_sizes(recipe, stage)
        model = Soundwave.build(recipe.model, parts=stage.parts)
        model.set_stage(stage)
        engine = Engine(model, recipe, stage, config, ranks)
        batch = worst_case_batch(recipe.data, stage.name, model.tokenizer, recipe.model)
        for step in range(1 + steps):
            if step == 1:
                start = time.perf_counter()
            result = engine.step(step, [batch], engine.reduce_step_counts([batch]))
        seconds = (time.perf_counter() - start) / steps
        plan = Planner(recipe, meta_model(recipe), 1, "h100")
        planned = plan.memory(2, plan.activations(case.seconds, 2)).total / 2**30
    text = (
        f"{result.sums['llm_tokens'] / seconds:.0f} LLM positions a second, peak {peak_memory():.2f} GiB, "
        f"planner {planned:.2f} GiB"
    )
    return [{"check": f"stage 2 step, width {width}", "outcome": "measured", "seconds": seconds, "why": text}]


ITEMS = (
    Item("op: parity", 90, lambda: run_tests("tests/model/ops/test_gpu.py")),
    Item("op: speed", 60, lambda: linear_ctc(full=False)),
    Item("look-back", 30, lookback),
    Item("stage 2 step", 60, packed_step),
    Item("generation", 60, lambda: run_tests("tests/model/test_gpu.py")),
    Item("training", 240, lambda: run_tests("tests/train/test_gpu.py")),
    Item("op: all sizes", 300, lambda: linear_ctc(full=True)),
)


def _work(item: Item, path: Path) -> None:
    """Write an item's rows to `path`; in a process of its own."""
    os.setsid()  # with what it starts, so that all of it can be killed
    try:
        rows = item.work()
    except Exception as error:
        text = str(error).splitlines()[:1]
        rows = [{"check": item.name, "outcome": "failed", "why": f"{type(error).__name__}: {' '.join(text)}"}]
    path.write_text(json.dumps(rows))
    sys.stdout.flush()
    os._exit(0)


def run_item(item: Item) -> list[dict]:
    """Return an item's rows; one that fails where it ends without any, or is not done in time."""
    from multiprocessing import get_context

    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "rows.json", time.monotonic()
        process = get_context("fork").Process(target=_work, args=(item, path))
        process.start()
        process.join(item.seconds)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return [{"check": item.name, "outcome": "failed", "why": f"not done after {item.seconds:g} s"}]
        if not path.exists():
            return [{"check": item.name, "outcome": "failed", "why": f"exit code {process.exitcode}"}]
        print(f"{item.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def run_items(items: tuple[Item, ...], facts: dict, out: Path, again: bool) -> list[dict]:
    """Run the items that `out` does not hold for this GPU and commit; write `out` after each."""
    done: dict[str, list[dict]] = {}
    if out.exists() and not again:
        before = json.loads(out.read_text())
        if all(before["machine"].get(key) == facts[key] for key in ("gpu", "commit")):
            done = before.get("items", {})
    for item in items:
        if item.name in done and all(row["outcome"] != "failed" for row in done[item.name]):
            continue
        done[item.name] = run_item(item)
        keep(out, {"machine": facts, "items": done}, table_of(done))
    return [row for rows in done.values() for row in rows]


def table_of(done: dict[str, list[dict]]) -> str:
    names = ["check", "outcome", "seconds", "why"]
    rows = [[item, *(row.get(name) for name in names)] for item, rows in done.items() for row in rows]
    return tabulate(rows, ["item", *names], floatfmt=".4f")


def main() -> int:
    parser = CommandParser("python -m benchmarks.gpu_check", __doc__, example="")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/gpu_check.json"),
        help="where the report goes, its table beside it (.txt)",
    )
    accept_old_name(parser, "--json", "--out")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument(
        "--tests-only", action="store_true", help="run the tests and leave out the measurements"
    )
    options = parser.parse_args()
    # A fork cannot use CUDA that its parent has started: a process of its own is asked.
    script = "import json; from benchmarks.machine import machine; import torch; "
    script += "print(json.dumps(machine('cuda') if torch.cuda.is_available() else None))"
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    facts = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else None
    if facts is None:
        print(
            "gpu-check needs a CUDA GPU and a CUDA build of torch; this machine's torch sees none",
            file=sys.stderr,
        )
        return 2
    facts |= {name: importlib.util.find_spec(name) is not None for name in WANTED}
    tests = ("op: parity", "generation", "training")
    items = tuple(item for item in ITEMS if item.name in tests or not options.tests_only)
    rows = run_items(items, facts, options.out, options.again)
    print(options.out.with_suffix(".txt").read_text() if options.out.exists() else "")
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
