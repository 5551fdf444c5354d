"""Triton kernels compiled ahead of time for GPUs that are not here: registers, spills and shared memory.

No GPU is needed: Triton's compiler takes a target, and ptxas comes with it. Resources of NVIDIA targets are
ptxas's; those of gfx942 are in the metadata of LLVM's assembly. The kernels are compiled as model/ops launches
them: types of arguments, block sizes and warps.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from model.ops.torch_op import TILE

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

from model.ops import triton_backend, triton_dropout  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: A multiprocessor holds 65,536 registers: 128 a thread leave room for 16 warps. Each kernel streams over its
#: tile once, so more shared memory than reductions need would be an error.
MOST_REGISTERS = 128
MOST_SHARED = 16 * 1024
#: Bytes a thread. Of 2,048 states (1,023 labels, the longest targets) ptxas spills 8 at 64 registers, which
#: 16 warps leave.
MOST_SPILLED = {"recursion, 2048 states": 16}

STATISTICS = {
    "log_mass": "*fp32",
    "best_value": "*fp32",
    "best_token": "*i32",
    **dict.fromkeys(("rows", "first_row", "first_token", "width", "tiles", "first_tile"), "i32"),
}
LABELS = {
    "frame": "*i64",
    "tokens": "*i64",
    "values": "*fp32",
    **dict.fromkeys(("first_token", "width", "length", "slots"), "i32"),
}
RECURSION = {
    **dict.fromkeys(("logprob", "loss", "occupancy", "alpha", "beta"), "*fp32"),
    **dict.fromkeys(("targets", "input_lengths", "target_lengths"), "*i64"),
    **dict.fromkeys(("length", "labels", "width"), "i32"),
}
#: Name -> kernel, types of its arguments, constants, warps.
KERNELS = {
    "statistics": (triton_backend._statistics, {"logits": "*bf16", **STATISTICS}, {"TILE_": TILE}, 4),
    "statistics, fp32": (triton_backend._statistics, {"logits": "*fp32", **STATISTICS}, {"TILE_": TILE}, 4),
    "probabilities": (
        triton_backend._probabilities,
        {"logits": "*bf16", "lse": "*fp32", "scale": "*fp32", "rows": "i32", "width": "i32"},
        {"TILE_": TILE},
        4,
    ),
    "label logits": (
        triton_backend._label_logits,
        {"logits": "*bf16", **LABELS},
        {"SLOTS": 128, "PLACE": False},
        4,
    ),
    "label logits, placed": (
        triton_backend._label_logits,
        {"logits": "*bf16", **LABELS},
        {"SLOTS": 128, "PLACE": True},
        4,
    ),
    "recursion, 256 states": (
        triton_backend._recursion,
        RECURSION,
        {"STATES": 256, "WITH_GRADIENT": True},
        4,
    ),
    "recursion, 2048 states": (
        triton_backend._recursion,
        RECURSION,
        {"STATES": 2048, "WITH_GRADIENT": True},
        16,
    ),
    "recursion, no gradient": (
        triton_backend._recursion,
        RECURSION,
        {"STATES": 256, "WITH_GRADIENT": False},
        4,
    ),
    "dropout": (
        triton_dropout._dropout,
        {
            "x": "*bf16",
            "keys": "*i64",
            "out": "*bf16",
            "rows": "i32",
            "width": "i32",
            "site": "i64",
            "threshold": "i32",
            "scale": "fp32",
        },
        {"ROWS_": triton_dropout.ROWS, "WORDS_": triton_dropout.WORDS},
        4,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compiled here and now, not taken from the user's cache."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def nvidia_resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text.stdout))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": int(found["SHARED"]),
    }


def amd_resources(assembly: str) -> dict[str, int]:
    found = {
        name: int(value)
        for name, value in re.findall(r"\.((?:vgpr|sgpr|group|private)_\w+):\s*(\d+)", assembly)
    }
    return {
        "registers": found["vgpr_count"],
        "spilled": found["vgpr_spill_count"]
        + found["sgpr_spill_count"]
        + found["private_segment_fixed_size"],
        "shared": found["group_segment_fixed_size"],
    }


@pytest.mark.slow  # 36 compilations
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_within_their_limits(target, tmp_path):
    table = {}
    for name, (kernel, types, constants, warps) in KERNELS.items():
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        assert set(signature) == set(kernel.arg_names), name
        places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        compiled = compile(
            ASTSource(kernel, {key: signature[key] for key in kernel.arg_names}, places),
            target=TARGETS[target],
            options={"num_warps": warps},
        )
        if target.startswith("sm"):
            table[name] = nvidia_resources(compiled.asm["cubin"], tmp_path)
        else:
            table[name] = amd_resources(compiled.asm["amdgcn"])
        table[name]["shared"] = max(table[name]["shared"], compiled.metadata.shared)
    print(target, table)
    wrong = {
        name: used
        for name, used in table.items()
        if used["registers"] > MOST_REGISTERS
        or used["spilled"] > MOST_SPILLED.get(name, 0)
        or used["shared"] > MOST_SHARED
    }
    assert not wrong, wrong
