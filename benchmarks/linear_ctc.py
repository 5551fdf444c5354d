"""Measure the fused CTC op against a baseline, both sides in one run.

    python -m benchmarks.linear_ctc [--full] [--out FILE]

    ordinary   F.linear in the given dtype, .float(), log_softmax, F.ctc_loss, backward
    chunked    what one could put together from PyTorch today: the same in chunks of 64 frames, computed again
               in backward (the op's own reference implementation)
    op         model.ops.linear_ctc, with its default skipping, and exact (skip_below=0)
    product    hidden @ weight.T alone, the floor of every path that makes the logits

Liger-Kernel's and cut-cross-entropy's kernels fuse the projection with a cross-entropy, not with CTC, and
need a GPU.

Posteriors: "random", as at the start of training; "peaked", from a trained stage 1 folder and its shards
(--model DIR --shards DIR), and made up: each frame points at the blank or at a label, 30 logits above
the rest (labelled "synthetic"). Sides take turns, and the fastest of --repeats counts. Memory is the growth
of the process's peak (on CUDA, of the allocator's) beyond what is there before the step, less the gradients.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.machine import keep, machine
from core.command_line import CommandParser, accept_old_name
from model.ops import linear_argmax, linear_ctc
from model.ops.linear_ctc import default_skip_below
from model.ops.torch_op import forward as op_forward

FRAMES_A_SECOND = 25
LABELS_A_SECOND = 2.7
# (utterances, seconds, D, |V|); the first is always run.
SHAPES = [(8, 15, 576, 49_153), (1, 30, 2048, 128_257), (1, 30, 4096, 128_257)]
MEMORY_SHAPE = (8, 30, 576, 128_257)
# "ratio to": the mark's other side. Values: float32 on the CPU, bfloat16 on the CPU, bfloat16 on CUDA.
MARKS = {
    ("peaked", "trained"): (0.45, 0.25, 0.40),
    ("peaked", "2^-12"): (0.30, 0.25, 0.40),
    ("peaked", "frozen"): (0.50, 0.27, 0.50),
    ("random", "trained, exact"): (1.15, 0.80, 1.10),
    ("any", "forward / product"): (0.90, 0.95, 1.20),
    ("any", "memory"): (0.03, 0.03, 0.03),
}


@dataclass
class Work:
    """One step's inputs. hidden [B, T, D]; the vocabulary's rows [V, D], and the blank's own row or none."""

    hidden: Tensor
    weight: Tensor
    extra_row: Tensor | None
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    blank: int
    posteriors: str

    def leaves(self, train_weight: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        row = None if self.extra_row is None else self.extra_row.detach().requires_grad_()
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(train_weight), row


def made_up(shape: tuple[int, int, int, int], posteriors: str, dtype: torch.dtype, device: str) -> Work:
    utterances, seconds, depth, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    frames, labels = seconds * FRAMES_A_SECOND, int(seconds * LABELS_A_SECOND)
    weight = torch.randn(vocabulary, depth, generator=generator) / math.sqrt(depth)
    hidden = torch.randn(utterances, frames, depth, generator=generator)
    targets = torch.randint(vocabulary - 1, (utterances, labels), generator=generator)
    if posteriors == "peaked":
        tokens = torch.full((utterances, frames), vocabulary - 1)
        tokens[:, torch.arange(labels) * frames // labels] = targets
        hidden = 30 * weight[tokens] + 0.3 * hidden
    lengths = torch.full((utterances,), frames), torch.full((utterances,), labels)
    return Work(
        hidden.to(device, dtype),
        weight.to(device, dtype),
        None,
        lengths[0].to(device),
        targets.to(device),
        lengths[1].to(device),
        vocabulary - 1,
        posteriors if posteriors == "random" else "peaked (synthetic)",
    )


def from_checkpoint(folder: str, shards: str, seconds: float, dtype: torch.dtype, device: str) -> Work:
    """Adapter frames of about so many seconds of a packed folder, and the CTC head, of a trained stage 1
    folder."""
    from model.artifact import load
    from stream import EvalStream

    model = load(folder, device=device)
    stream = EvalStream(
        shards, model.tokenizer, model.config, "alignment", batch_seconds=seconds, answers=True
    )
    batch = next(batch for batch, samples in stream if samples).to(device)
    with torch.no_grad():
        audio = model.encode_audio(batch)
    head = model.ctc_head
    row = None if head.blank_row is None else head.blank_row.detach().to(dtype)
    return Work(
        audio.hidden.to(dtype),
        head.weight.detach().to(dtype),
        row,
        audio.lengths,
        batch.ctc_targets,
        batch.ctc_target_lengths,
        head.blank,
        f"peaked ({Path(folder).name})",
    )


def ordinary(work: Work, leaves: tuple) -> Tensor:
    hidden, weight, row = leaves
    logits = functional.linear(hidden, weight)
    if (
        row is not None
    ):  # behind the product: joined to a frozen weight, the row would make autograd compute its gradient, too
        logits = torch.cat([logits, functional.linear(hidden, row[None])], -1)
    logprob = logits.float().log_softmax(-1)
    return functional.ctc_loss(
        logprob.transpose(0, 1),
        work.targets,
        work.lengths,
        work.target_lengths,
        blank=work.blank,
        zero_infinity=True,
    )


def fused(work: Work, leaves: tuple, skip_below: float | None = None, implementation: str = "auto") -> Tensor:
    hidden, weight, row = leaves
    return linear_ctc(
        hidden,
        weight,
        work.lengths,
        work.targets,
        work.target_lengths,
        work.blank,
        extra_row=row,
        skip_below=skip_below,
        implementation=implementation,
    )[0]


def stepper(work: Work, train_weight: bool, loss: Callable[[Work, tuple], Tensor]) -> Callable[[], int]:
    """A function that does forward and backward on fresh leaves and returns the gradients' bytes."""

    def step() -> int:
        leaves = work.leaves(train_weight)
        loss(work, leaves).backward()
        return sum(leaf.grad.nbytes for leaf in leaves if leaf is not None and leaf.grad is not None)

    return step


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(
    sides: dict[str, Callable], repeats: int, device: str, label: str
) -> dict[str, tuple[float, float]]:
    """Each side's fastest wall-clock seconds, and its least processor seconds; the sides take turns."""
    best = {name: (math.inf, math.inf) for name in sides}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for name, side in sides.items():
            gc.collect()
            synchronise(device)
            before, start = os.times(), time.perf_counter()
            side()
            synchronise(device)
            wall, after = time.perf_counter() - start, os.times()
            processor = after.user - before.user + after.system - before.system
            best[name] = min(best[name][0], wall), min(best[name][1], processor)
    return best


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(step: Callable[[], int], device: str) -> int | None:
    """Bytes that one step needs at its peak, beyond what was there and its gradients; None where that cannot
    be read."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return -step() + torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # pages that the C library keeps for itself would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    return -step() + status("VmHWM") - before


def available_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def skipped_share(work: Work, skip_below: float | None = None) -> float:
    """Share of (frame, tile) pairs whose softmax mass lies below a threshold (None: the default one)."""
    from model.ops.linear_ctc import _choose

    implementation = _choose("auto", work.hidden.device.type, work.hidden.dtype)
    threshold = math.log(skip_below or default_skip_below(work.hidden.dtype))
    with torch.no_grad():
        _, _, lse, _, _, log_mass, _ = op_forward(
            work.hidden,
            work.weight,
            work.extra_row,
            work.lengths,
            work.targets,
            work.target_lengths,
            work.blank,
            0.0,
            implementation,
            False,
            False,
        )
    real = (torch.arange(lse.shape[1], device=lse.device)[None] < work.lengths[:, None]).flatten()
    return float((log_mass - lse.flatten()[:, None] < threshold)[real].float().mean())


def gradient_errors(work: Work) -> dict[str, list[float]]:
    """Relative error of the gradients of hidden, weight and the blank's row against float64: of the baseline,
    and of the op by the exponent of `skip_below`."""

    def gradients(loss: Callable[[Work, tuple], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        row = None if work.extra_row is None else work.extra_row.to(dtype)
        there = replace(work, hidden=work.hidden.to(dtype), weight=work.weight.to(dtype), extra_row=row)
        leaves = there.leaves(True)
        loss(there, leaves).backward()
        return [leaf.grad.double() for leaf in leaves if leaf is not None]

    truth = gradients(ordinary, torch.float64)
    sides: dict[str, Callable[[Work, tuple], Tensor]] = {"ordinary": ordinary}
    sides["exact"] = lambda w, leaves: fused(w, leaves, 0.0)
    for exponent in (24, 20, 19, 18, 16, 12):
        sides[f"2^-{exponent}"] = lambda w, leaves, power=exponent: fused(w, leaves, 2.0**-power)
    return {
        name: [float((a - b).norm() / b.norm()) for a, b in zip(gradients(side), truth, strict=True)]
        for name, side in sides.items()
    }


def compare(work: Work, repeats: int, device: str, chunked: bool) -> tuple[dict, list[dict]]:
    dtype = str(work.hidden.dtype).removeprefix("torch.")
    shape = [*work.hidden.shape, work.weight.shape[0] + (work.extra_row is not None)]
    label = f"{dtype} {work.posteriors} {shape}"
    trained, frozen = (
        {
            "ordinary": stepper(work, train, ordinary),
            "op": stepper(work, train, fused),
            "op exact": stepper(work, train, lambda w, leaves: fused(w, leaves, 0.0)),
        }
        for train in (True, False)
    )
    coarser = dtype == "float32" and work.posteriors != "random"  # at random nothing is skipped
    if coarser:
        for train, sides in ((True, trained), (False, frozen)):
            sides["op 2^-12"] = stepper(work, train, lambda w, leaves: fused(w, leaves, 2.0**-12))
    if chunked:
        trained["chunked"] = stepper(work, True, lambda w, leaves: fused(w, leaves, None, "reference"))

    def product():
        return functional.linear(work.hidden, work.weight)

    def sweep():
        return linear_argmax(
            work.hidden, work.weight, work.lengths, blank=work.blank, extra_row=work.extra_row
        )

    with torch.no_grad():
        sweep()  # compiles and warms up
        alone = seconds_of({"product": product, "forward": sweep}, repeats, device, label)
    times = {
        "trained": seconds_of(trained, repeats, device, label),
        "frozen": seconds_of(frozen, repeats, device, label),
    }
    flops = 2 * work.hidden.shape[0] * work.hidden.shape[1] * work.hidden.shape[2] * shape[-1]
    result = {
        "dtype": dtype,
        "shape": shape,
        "posteriors": work.posteriors,
        "skipped_share": skipped_share(work),
        "skipped_share_2^-12": skipped_share(work, 2.0**-12),
        "seconds": times | {"alone": alone},
        "product_gflops": flops / alone["product"][0] / 1e9,
    }

    if work.posteriors.startswith("peaked (") and "synthetic" not in work.posteriors and coarser:
        result["gradient_errors"] = gradient_errors(work)
    kind, rows = work.posteriors.split()[0], []

    def row(what: str, ours: tuple, theirs: tuple, key: tuple[str, str] | None) -> None:
        column = 2 if device == "cuda" else int(dtype != "float32")
        mark = MARKS[key][column] if key in MARKS else None
        rows.append(
            {
                "dtype": dtype,
                "B,T,D,V": "x".join(map(str, shape)),
                "posteriors": work.posteriors,
                "what": what,
                "seconds": ours[0],
                "other seconds": theirs[0],
                "ratio": ours[0] / theirs[0],
                "ratio of CPU time": ours[1] / theirs[1] if device == "cpu" and theirs[1] else None,
                "mark": mark,
            }
        )

    for name in ("trained", "frozen"):
        row(f"{name}: op / ordinary", times[name]["op"], times[name]["ordinary"], (kind, name))
        row(
            f"{name}, exact: op / ordinary",
            times[name]["op exact"],
            times[name]["ordinary"],
            (kind, f"{name}, exact"),
        )
        if coarser:
            row(
                f"{name}, skip_below 2^-12: op / ordinary",
                times[name]["op 2^-12"],
                times[name]["ordinary"],
                (kind, "2^-12"),
            )
    if chunked:
        row("trained: op / chunked", times["trained"]["op"], times["trained"]["chunked"], None)
    row("forward alone: op / product", alone["forward"], alone["product"], ("any", "forward / product"))
    return result, rows


def compare_memory(dtype: torch.dtype, device: str, shape: tuple) -> tuple[dict, list[dict]]:
    """At full size, where the baseline fits: about four tensors of frames x vocabulary in float32."""
    frames = shape[0] * shape[1] * FRAMES_A_SECOND
    work = made_up(shape, "random", dtype, device)
    result = {"dtype": str(dtype).removeprefix("torch."), "shape": [*work.hidden.shape, shape[3]]}
    made_up_small = made_up((1, 1, *shape[2:]), "random", dtype, device)
    for loss in (fused, ordinary):
        stepper(made_up_small, True, loss)()  # libraries' own buffers are not counted
    ours = extra_memory(stepper(work, True, fused), device)
    limit = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    need = 4.2 * frames * shape[3] * 4
    slow = device == "cpu" and dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    theirs = None if need > limit or slow else extra_memory(stepper(work, True, ordinary), device)
    counted = "measured"
    if (
        theirs is None
    ):  # logits in float32, log-probabilities and their gradient are there at once: the least it can need
        theirs, counted = (
            3 * frames * shape[3] * 4,
            "by arithmetic: 3 tensors of frames x vocabulary in float32",
        )
    result |= {"op_bytes": ours, "ordinary_bytes": theirs, "ordinary_counted": counted}
    row = {
        "dtype": result["dtype"],
        "B,T,D,V": "x".join(map(str, result["shape"])),
        "posteriors": "random",
        "what": f"extra memory, GB: op / ordinary ({counted.split(':')[0]})",
        "seconds": ours / 1e9,
        "other seconds": theirs / 1e9,
        "ratio": ours / theirs,
        "mark": MARKS["any", "memory"][0],
    }
    return result, [row]


def run(
    device: str,
    dtypes: list[torch.dtype],
    full: bool,
    repeats: int,
    memory: bool,
    checkpoint: str | None = None,
    shards: str | None = None,
) -> dict:
    facts = machine(device) | {"native_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    results, rows = [], []
    shapes = SHAPES if full or device == "cuda" else SHAPES[:1]
    for dtype in dtypes:
        # Where bfloat16 products run in plain loops (30 times slower), the baseline gets a short clip.
        slow = device == "cpu" and dtype != torch.float32 and not facts["native_bf16"]
        for shape in shapes[:1] if slow else shapes:
            shape = (1, 4, *shape[2:]) if slow else shape
            works = [made_up(shape, "random", dtype, device)]
            if checkpoint and shape[2:] == SHAPES[0][2:]:
                works.append(from_checkpoint(checkpoint, shards, shape[0] * shape[1], dtype, device))
            works.append(made_up(shape, "peaked", dtype, device))
            for work in works:
                result, more = compare(work, 1 if slow else repeats, device, chunked=not slow)
                results.append(result)
                rows += more
        if memory and not slow:
            result, more = compare_memory(dtype, device, MEMORY_SHAPE)
            results.append(result)
            rows += more
    return {"machine": facts, "load_after": os.getloadavg()[0], "results": results, "rows": rows}


def table(report: dict) -> str:
    names = [
        "dtype",
        "B,T,D,V",
        "posteriors",
        "what",
        "seconds",
        "other seconds",
        "ratio",
        "ratio of CPU time",
        "mark",
    ]
    skipped = [
        f"skipped {r['dtype']} {r['posteriors']} {r['shape']}: {r['skipped_share']:.4f} of the (frame, tile) "
        f"pairs "
        f"(below 2^-12: {r['skipped_share_2^-12']:.4f})"
        for r in report["results"]
        if "skipped_share" in r
    ]
    rows = [[row.get(name) for name in names] for row in report["rows"]]
    errors = [
        f"relative error of the gradient of hidden, weight, blank's row, {r['posteriors']}, {name}: "
        + ", ".join(f"{value:.1e}" for value in values)
        for r in report["results"]
        for name, values in r.get("gradient_errors", {}).items()
    ]
    return "\n".join([tabulate(rows, names, floatfmt=".3f"), *skipped, *errors])


def main() -> int:
    parser = CommandParser("python -m benchmarks.linear_ctc", __doc__, example="--full")
    parser.add_argument(
        "--full", action="store_true", help="also D = 2,048 and 4,096 with a vocabulary of 128,257 (minutes)"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the memory comparison (a step of 8 x 30 s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the fastest counts")
    parser.add_argument("--model", help="stage 1 model folder to take peaked posteriors from; needs --shards")
    accept_old_name(parser, "--checkpoint", "--model")
    parser.add_argument("--shards", help="packed folder for --model")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/linear_ctc.json"),
        help="where the report goes, its table beside it (.txt)",
    )
    accept_old_name(parser, "--json", "--out")
    options = parser.parse_args()
    if bool(options.model) != bool(options.shards):
        sys.exit("--model and --shards go together: a stage 1 model folder and a packed folder to run it on")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [getattr(torch, options.dtype)] if options.dtype else [torch.float32, torch.bfloat16]
    report = run(
        device,
        dtypes,
        options.full,
        options.repeats,
        not options.no_memory,
        options.model,
        options.shards,
    )
    text = table(report)
    print(text)
    keep(options.out, report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
