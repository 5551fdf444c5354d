"""Run every test and benchmark that needs a CUDA GPU, in a few minutes.

    python -m benchmarks.gpu_check [--out FILE]

First the tests on the GPU (tests/*/test_gpu.py), by pytest; then the fused op's benchmark in bfloat16 and
look-back attention through FlashAttention and through PyTorch. What is not installed is skipped by name. One
JSON, one table; exit code 1 if a test failed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.machine import keep, machine
from core.command_line import CommandParser, accept_old_name

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 420
WANTED = ("triton", "transformers", "peft", "deepspeed", "flash_attn", "hypothesis", "pytest")


def run_tests() -> list[dict]:
    """One row a test: name, outcome (passed, skipped, failed), seconds, and why."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return [{"check": "tests", "outcome": "skipped", "why": "pytest or hypothesis is not installed"}]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        side_by_side = ["-n", "4", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "--continue-on-collection-errors",
            f"--junitxml={report}",
            *side_by_side,
            *map(str, sorted(ROOT.glob("tests/*/test_gpu.py"))),
        ]
        try:
            subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return [{"check": "tests", "outcome": "failed", "why": f"not done after {TEST_SECONDS} s"}]
        rows = []
        for case in xml.parse(report).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
            rows.append(
                {
                    "check": f"{case.get('classname', '')}.{case.get('name')}",
                    "outcome": outcome,
                    "seconds": float(case.get("time", 0)),
                    "why": "" if problem is None else (problem.get("message") or "")[:300],
                }
            )
        return rows


def linear_ctc() -> tuple[list[dict], dict | None]:
    if importlib.util.find_spec("triton") is None:
        return [
            {"check": "benchmark linear_ctc", "outcome": "skipped", "why": "triton is not installed"}
        ], None
    from benchmarks.linear_ctc import run

    report = run("cuda", [torch.bfloat16], full=True, repeats=5, memory=True)
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
    return rows, report


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


def main() -> int:
    parser = CommandParser("python -m benchmarks.gpu_check", __doc__, example="")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/gpu_check.json"),
        help="where the report goes, its table beside it (.txt)",
    )
    accept_old_name(parser, "--json", "--out")
    parser.add_argument("--tests-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA GPU and a CUDA build of torch; this machine's torch sees none",
            file=sys.stderr,
        )
        return 2
    facts = machine("cuda") | {name: importlib.util.find_spec(name) is not None for name in WANTED}
    rows, details = run_tests(), None
    if not options.tests_only:
        more, details = linear_ctc()
        rows += more + lookback()
    names = ["check", "outcome", "seconds", "why"]
    table = tabulate([[row.get(name) for name in names] for row in rows], names, floatfmt=".4f")
    print(table)
    keep(options.out, {"machine": facts, "rows": rows, "linear_ctc": details}, table)
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
