"""The Triton backend: on a GPU where there is one, else by Triton's interpreter, which needs a process of its
own.

(TRITON_INTERPRET must be set before triton is first imported, and anything may have imported it here.)
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from model.ops import keyed_dropout, linear_ctc
from tests.model.ops.truth import cases, check, ordinary, peaked, with_skipped_tiles

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_interpreter starts")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "8 passed" in done.stdout


BATCH = {
    "rows",
    "first_row",
    "first_token",
    "tiles",
    "first_tile",
    "length",
    "slots",
    "labels",
}  # what follows the batch
KERNELS = {
    "_statistics": {
        "logits": None,
        "log_mass": "*fp32",
        "best_value": "*fp32",
        "best_token": "*i32",
        "width": "i32",
    },
    "_probabilities": {"logits": None, "lse": "*fp32", "scale": "*fp32", "width": "i32"},
    "_label_logits": {"logits": None, "frame": "*i64", "tokens": "*i64", "values": "*fp32", "width": "i32"},
    "_recursion": {
        "logprob": "*fp32",
        "targets": "*i64",
        "input_lengths": "*i64",
        "target_lengths": "*i64",
        "loss": "*fp32",
        "occupancy": "*fp32",
        "alpha": "*fp32",
        "beta": "*fp32",
        "width": "i32",
    },
}
CONSTANTS = {"TILE_": 512, "SLOTS": 128, "PLACE": True, "STATES": 256, "WITH_GRADIENT": True}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_kernels_compile_for_a_gpu_and_once_for_all_batches(kernel, logits):
    """For an H100, whatever this machine has. A number that follows the batch must not be specialised (each
    kind of it would be compiled anew within training), nor anything tuned by it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.ops import triton_backend

    function = getattr(triton_backend, kernel)
    assert type(function) is triton.JITFunction
    names = {p.name for p in function.params}
    constants = {(place,): CONSTANTS[p.name] for place, p in enumerate(function.params) if p.is_constexpr}
    types = {name: kind or logits for name, kind in KERNELS[kernel].items()} | dict.fromkeys(
        names & BATCH, "i32"
    )
    signature = {p.name: "constexpr" if p.is_constexpr else types[p.name] for p in function.params}
    made = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
    assert {p.name for p in function.params if not p.is_constexpr and not p.do_not_specialize} <= set(
        KERNELS[kernel]
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("x", ["*bf16", "*fp32"])
def test_dropout_compiles_for_a_gpu_once_for_all_batches_and_places(x):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.ops import triton_dropout

    function = triton_dropout._dropout
    types = {
        "x": x,
        "out": x,
        "keys": "*i64",
        "rows": "i32",
        "width": "i32",
        "site": "i64",
        "threshold": "i32",
        "scale": "fp32",
    }
    signature = {p.name: "constexpr" if p.is_constexpr else types[p.name] for p in function.params}
    constants = {
        (place,): {"ROWS_": triton_dropout.ROWS, "WORDS_": triton_dropout.WORDS}[p.name]
        for place, p in enumerate(function.params)
        if p.is_constexpr
    }
    assert triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32)).asm[
        "cubin"
    ]
    assert {p.name for p in function.params if p.do_not_specialize} == {"rows", "site", "threshold"}


@interpreted
def test_dropout_has_the_masks_of_plain_pytorch():
    from model.ops import triton_dropout

    shapes = {
        (3, 7, 50): torch.float32,
        (5, 1030): torch.bfloat16,
        (1, 4): torch.float32,
        (9, 1): torch.float32,
    }
    for shape, dtype in shapes.items():
        x, keys = 1 + torch.rand(shape).to(dtype), torch.randint(-(2**63), 2**63 - 1, shape[:-1])
        for site in (5, -(2**63), 2**63 - 1, 0):
            plain = keyed_dropout(x, keys, site, 0.1)
            torch.testing.assert_close(
                triton_dropout.apply(x, keys, site, round(0.1 * 2**16)), plain, rtol=1e-2, atol=0
            )


def run(case, leaves, **options):
    hidden, weight, extra_row = leaves
    return linear_ctc(
        hidden,
        weight,
        case.input_lengths,
        case.targets,
        case.target_lengths,
        case.blank,
        extra_row=extra_row,
        implementation="triton",
        reduction="none",
        **options,
    )


@interpreted
def test_as_ctc_loss_in_float32():
    @few
    @given(cases(most_frames=8, vocabularies=(3, 513, 1100)))
    def holds(case):
        leaves = case.inputs(torch.float32)
        check(case, run(case, leaves, skip_below=0.0), leaves, relative=3e-5)

    holds()


@interpreted
def test_as_ctc_loss_in_bfloat16():
    @few
    @given(cases(most_frames=8, vocabularies=(7, 600), scale=0.7))
    def holds(case):
        leaves = case.inputs(torch.bfloat16)
        check(case, run(case, leaves, skip_below=0.0), leaves, relative=0.05)

    holds()


@interpreted
def test_several_pieces_of_frames_and_vocabulary(monkeypatch):
    from model.ops import triton_backend

    monkeypatch.setattr(triton_backend, "LOGITS_AT_ONCE", 4 * 512 * 8)  # 8 frames x 4 tiles
    case = peaked(2, 10, 16, 2600, 4, sharpness=4.0)
    case.input_lengths = torch.tensor([10, 9])
    leaves = case.inputs(torch.float32)
    check(case, run(case, leaves, skip_below=0.0), leaves, relative=3e-5)
    check(case, run(case, leaves), leaves, relative=3e-5)


@interpreted
def test_frames_that_are_nearly_certain():
    """Softmax minus occupancy is subtracted in float32 here: right to a hundredth of that small gradient
    (C++: to 1e-5)."""
    case = peaked(1, 24, 64, 600, 4, sharpness=20.0)
    leaves = case.inputs(torch.float32)[:2]
    true_loss, truth, _ = ordinary(case, *leaves, None)
    loss, *_ = run(case, (*leaves, None), skip_below=0.0)
    assert (loss - true_loss).norm() <= 1e-2 * true_loss.norm()
    for ours, wanted in zip(torch.autograd.grad(loss.sum(), leaves), truth, strict=True):
        error = float((ours - wanted).norm() / wanted.norm())
        print(f"gradient's error {error:.1e}")
        assert error <= 1e-2


@interpreted
@pytest.mark.parametrize("extra_row", [False, True])
def test_skipped_pieces_contribute_their_mean(extra_row, monkeypatch):
    from model.ops import triton_backend

    monkeypatch.setattr(triton_backend, "LOGITS_AT_ONCE", 4 * 512 * 8)  # 8 frames x 4 tiles
    case = peaked(2, 12, 128, 3300, 3, sharpness=16.0, extra_row=extra_row, label_pool=1000)
    case.input_lengths = torch.tensor([12, 9])
    padded = case.inputs(torch.float32)
    leaves = [leaf for leaf in padded if leaf is not None]
    expected, share = with_skipped_tiles(case, padded, 1e-2, piece=4)
    assert share > 0.1
    loss = run(case, padded, skip_below=1e-2)[0]
    for ours, truth in zip(torch.autograd.grad(loss.sum(), leaves), expected, strict=True):
        assert (ours - truth).norm() <= 1e-2 * truth.norm()


@interpreted
def test_frozen_weight_skipped_tiles_and_infinite_loss():
    case = peaked(2, 12, 64, 1600, 3, sharpness=20.0, extra_row=True, label_pool=400)
    hidden, weight, extra_row = case.inputs(torch.float32)
    check(
        case,
        run(case, (hidden, weight, extra_row), deterministic=True),
        (hidden, weight, extra_row),
        relative=3e-5,
    )
    case.input_lengths = torch.tensor([12, 2])
    loss, *_ = run(case, (hidden, weight.detach(), extra_row), zero_infinity=False)
    loss.sum().backward()
    assert (
        loss[1] == torch.inf and (hidden.grad[1] == 0).all() and hidden.grad[0].any() and weight.grad is None
    )
