"""The C++ implementation and the reference against F.log_softmax + F.ctc_loss in float64, and what torch asks
of an op."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils.checkpoint import checkpoint

from model.ops import build, cpp_backend, linear_argmax, linear_ctc, torch_op
from tests.model.ops.truth import Case, cases, check, ordinary, peaked, with_skipped_tiles

needs_cpp = pytest.mark.skipif(not cpp_backend.available(), reason="no C++ compiler")
IMPLEMENTATIONS = ["reference", pytest.param("cpp", marks=needs_cpp)]
some = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def run(case: Case, leaves, implementation: str, **options):
    hidden, weight, extra_row = leaves
    options.setdefault("reduction", "none")
    return linear_ctc(
        hidden,
        weight,
        case.input_lengths,
        case.targets,
        case.target_lengths,
        case.blank,
        extra_row=extra_row,
        implementation=implementation,
        **options,
    )


@needs_cpp
def test_without_a_compiler_the_library_that_was_built_is_taken(monkeypatch, tmp_path):
    made = build.build()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build().name.split("-")[:2] == made.name.split("-")[:2]
    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    with pytest.raises(build.BuildError, match="no C.. compiler found"):
        build.build()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_as_ctc_loss_in_float32(implementation, strided):
    @some
    @given(cases())
    def holds(case):
        leaves = case.inputs(torch.float32, strided)
        check(case, run(case, leaves, implementation, skip_below=0.0), leaves, relative=1e-5)

    holds()


@needs_cpp
@pytest.mark.parametrize("native", [False, True])
def test_as_ctc_loss_in_bfloat16(native, monkeypatch):
    """Converted tiles: only the results are rounded. Native products round the logits too (as the
    baseline does)."""
    monkeypatch.setattr(cpp_backend, "native_bf16", lambda: native)

    @some
    @given(cases(scale=0.7))
    def holds(case):
        leaves = case.inputs(torch.bfloat16)
        check(case, run(case, leaves, "cpp", skip_below=0.0), leaves, relative=0.05 if native else 2**-8)

    holds()


@needs_cpp
@pytest.mark.parametrize(
    "hidden_dtype, weight_dtype, relative",
    [
        (torch.float32, torch.bfloat16, 2**-8),
        (torch.bfloat16, torch.float32, 2**-8),
        (torch.float16, torch.float32, 2**-9),
    ],
)
def test_weight_of_another_dtype(hidden_dtype, weight_dtype, relative):
    case = peaked(2, 30, 8, 700, 4, sharpness=2.0, extra_row=True)
    leaves = [
        case.hidden.to(hidden_dtype).requires_grad_(),
        case.weight.to(weight_dtype).requires_grad_(),
        case.extra_row.to(weight_dtype).requires_grad_(),
    ]
    check(case, run(case, leaves, "cpp", skip_below=0.0), leaves, relative)


@needs_cpp
def test_many_blocks_and_threads(two_threads):
    """More frames than one product takes, padded frames between, two threads: right, and the same bits every
    time."""
    case = peaked(3, 300, 16, 1500, 20, sharpness=3.0)
    case.input_lengths = torch.tensor([300, 211, 257])
    leaves = case.inputs(torch.float32)
    check(case, run(case, leaves, "cpp", skip_below=0.0), leaves, relative=1e-5)
    runs = []
    for _ in range(4):
        results = run(case, leaves, "cpp", deterministic=True)
        runs.append([*results, *torch.autograd.grad(results[0].sum(), leaves[:2])])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@needs_cpp
@pytest.mark.parametrize("skip_below", [1e-3, 1e-2])
@pytest.mark.parametrize("extra_row", [False, True])
def test_skipped_tiles_contribute_their_mean(skip_below, extra_row):
    """Against float64 with the same rule."""
    case = peaked(2, 60, 256, 2100, 5, sharpness=16.0, extra_row=extra_row, label_pool=1000)
    case.input_lengths, case.loss_weight = torch.tensor([60, 47]), torch.tensor([0.5, 2.0]).double()
    padded = case.inputs(torch.float32)
    leaves = [leaf for leaf in padded if leaf is not None]
    expected, share = with_skipped_tiles(case, padded, skip_below)
    assert 0.2 < share < 1
    loss = run(case, padded, "cpp", skip_below=skip_below)[0]
    found = torch.autograd.grad((loss * case.loss_weight.float()).sum(), leaves)
    for ours, truth in zip(found, expected, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


@needs_cpp
@pytest.mark.parametrize("skip_below", [1e-3, 1e-2])
@pytest.mark.parametrize("extra_row", [False, True])
def test_skipping_stays_within_its_bound(skip_below, extra_row):
    """The bounds of docs/internals/fused-op.md."""
    case = peaked(2, 60, 256, 2100, 5, sharpness=16.0, extra_row=extra_row, label_pool=1000)
    leaves = case.inputs(torch.float32)[: 3 if extra_row else 2]
    padded = leaves if extra_row else [*leaves, None]
    exact = torch.autograd.grad(run(case, padded, "cpp", skip_below=0.0)[0].sum(), leaves)
    skipped = torch.autograd.grad(run(case, padded, "cpp", skip_below=skip_below)[0].sum(), leaves)
    tiles, means = case.weight.split(torch_op.TILE), []
    for tile in tiles:
        means.append(tile.mean(0))
    spread = max(float((tile - mean).norm(dim=1).max()) for tile, mean in zip(tiles, means, strict=True))
    spread = max(spread, *(float(mean.norm()) for mean in means))
    labels = case.targets.shape[1]
    largest_row = float(case.weight.norm(dim=1).max())
    error = (exact[0] - skipped[0]).norm(dim=-1)
    assert 0 < error.max() <= skip_below * (len(tiles) * spread + (labels + 1) * largest_row)
    error, frames = (exact[1] - skipped[1]).norm(dim=1), case.hidden.norm(dim=-1).sum()
    is_label = torch.zeros(len(error), dtype=torch.bool)
    is_label[case.targets.flatten()] = True
    assert 0 < error[~is_label].max() <= skip_below * frames
    assert error[is_label].max() <= 2 * skip_below * frames


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_skipped_tiles_lowers_the_error(dtype, monkeypatch):
    case = peaked(2, 60, 256, 2100, 5, sharpness=16.0, label_pool=1000)
    leaves = case.inputs(dtype)[:2]
    truth = ordinary(case, *leaves, None)[1]

    def error() -> list[float]:
        found = torch.autograd.grad(run(case, [*leaves, None], "cpp", skip_below=2.0**-8)[0].sum(), leaves)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    with_mean = error()
    monkeypatch.setattr(torch_op, "add_skipped", lambda *_: None)
    dropped = error()
    print(with_mean, dropped)
    assert all(one < other for one, other in zip(with_mean, dropped, strict=True))


@needs_cpp
def test_frames_that_are_nearly_certain():
    """Where nearly all mass lies on one token, softmax minus occupancy is a small difference of large
    numbers. It is right to 1e-5 of the gradient (as in the baseline; autograd through the reference
    gives 5e-4). The error of skipping does not shrink with the gradient: below 2^-24 it is within the same
    limit, at the default within 1e-3 of this gradient, which is tiny."""
    case = peaked(2, 60, 64, 2100, 5, sharpness=20.0)
    leaves = case.inputs(torch.float32)[:2]
    true_loss, truth, _ = ordinary(case, *leaves, None)
    for options, limit in (({"skip_below": 0.0}, 1e-5), ({"skip_below": 2.0**-24}, 1e-5), ({}, 1e-3)):
        loss, *_ = run(case, (*leaves, None), "cpp", **options)
        assert (loss - true_loss).norm() <= 1e-5 * true_loss.norm()  # float32 log_softmax + ctc_loss: 1e-4
        for ours, wanted in zip(torch.autograd.grad(loss.sum(), leaves), truth, strict=True):
            assert (ours - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_reductions_and_impossible_alignments(implementation, reduction, zero_infinity):
    """Rows: fits; fits exactly; a repeat too many (inf); empty target; no frames (inf); neither frames nor
    target."""
    hidden, weight = torch.randn(6, 9, 6), torch.randn(23, 6)
    targets = torch.tensor(
        [[1, 1, 2, 0], [3, 4, 5, 3], [4, 4, 4, 4], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    )
    input_lengths, target_lengths = torch.tensor([9, 4, 6, 4, 0, 0]), torch.tensor([4, 4, 4, 0, 1, 0])
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    expected = torch.nn.functional.ctc_loss(
        (hidden @ weight.T).log_softmax(-1).transpose(0, 1),
        targets,
        input_lengths,
        target_lengths,
        blank=22,
        **options,
    )
    hidden.requires_grad_()
    loss, *_ = linear_ctc(
        hidden, weight, input_lengths, targets, target_lengths, 22, implementation=implementation, **options
    )
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[2] == 0).all() and hidden.grad[1, :4].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batch(implementation):
    hidden, weight = torch.randn(0, 5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    targets = torch.zeros(0, 2, dtype=torch.int64)
    loss, argmax, *_ = linear_ctc(hidden, weight, none, targets, none, 0, implementation=implementation)
    loss.backward()
    assert (
        loss == 0 and argmax.shape == (0, 5) and (weight.grad == 0).all() and hidden.grad.shape == (0, 5, 3)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_parts_get_no_gradient(implementation):
    case = peaked(2, 20, 8, 600, 3, sharpness=3.0, extra_row=True)
    hidden, weight, extra_row = case.inputs(torch.float32)
    full = torch.autograd.grad(
        run(case, (hidden, weight, extra_row), implementation)[0].sum(), (hidden, extra_row)
    )
    weight.requires_grad_(False)
    run(case, (hidden, weight, extra_row), implementation)[0].sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, full[0])
    torch.testing.assert_close(extra_row.grad, full[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_broken_numbers(implementation):
    """NaN in a frame that counts shows in its utterance's loss alone; in a padded frame it does nothing."""
    case = peaked(3, 12, 8, 600, 3, sharpness=3.0)
    case.input_lengths = torch.tensor([12, 9, 12])
    leaves = case.inputs(torch.float32)
    with torch.no_grad():
        leaves[0][1, 10] = torch.nan
    loss = run(case, leaves, implementation)[0]
    loss.sum().backward()
    assert loss.isfinite().all() and leaves[1].grad.isfinite().all()
    with torch.no_grad():
        leaves[0][1, 3] = torch.nan
        assert run(case, leaves, implementation)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "change, words",
    [
        ({"targets": [[1], [22]]}, "utterance 1: target 22 at position 0 is the blank"),
        ({"targets": [[1], [23]]}, "utterance 1: target 23 at position 0 lies outside the vocabulary of 23"),
        ({"targets": [[-1], [3]]}, "utterance 0: target -1 at position 0 lies outside"),
        ({"input_lengths": [5, 4]}, "utterance 0: input length 5"),
        ({"target_lengths": [1, 2]}, "utterance 1: target length 2"),
    ],
)
def test_errors_name_the_utterance(implementation, change, words):
    given_values = {"input_lengths": [4, 4], "targets": [[1], [2]], "target_lengths": [1, 1]} | change
    tensors = {name: torch.tensor(value) for name, value in given_values.items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        linear_ctc(
            torch.randn(2, 4, 3), torch.randn(23, 3), blank=22, implementation=implementation, **tensors
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"reduction": "avg"}, "reduction='avg'"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
        ({"blank": 23}, "blank 23"),
        ({"extra_row": torch.zeros(3)}, "its index V = 23"),
        ({"weight": torch.zeros(23, 4)}, "do not fit"),
        ({"input_lengths": torch.tensor([4])}, "input_lengths (1,)"),
        ({"target_lengths": torch.tensor([4])}, "target_lengths (1,)"),
    ],
)
def test_errors_name_the_argument(arguments, words):
    defaults = {
        "hidden": torch.randn(2, 4, 3),
        "weight": torch.randn(23, 3),
        "input_lengths": torch.tensor([4, 4]),
        "targets": torch.tensor([[1], [2]]),
        "target_lengths": torch.tensor([1, 1]),
        "blank": 22,
    }
    with pytest.raises(ValueError, match=re.escape(words)):
        linear_ctc(**(defaults | arguments))


@needs_cpp
def test_argmax_alone_is_the_same_sweep():
    case = peaked(2, 40, 8, 1300, 5, sharpness=3.0, extra_row=True)
    case.input_lengths = torch.tensor([40, 17])
    hidden, weight, extra_row = case.inputs(torch.float32)
    whole = run(case, (hidden, weight, extra_row), "cpp")[1:]
    alone = linear_argmax(
        hidden, weight, case.input_lengths, blank=case.blank, extra_row=extra_row, implementation="cpp"
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True)) and not any(
        t.requires_grad for t in alone
    )


@needs_cpp
def test_opcheck():
    case = peaked(2, 6, 4, 515, 2, sharpness=2.0, extra_row=True)
    arguments = (
        *case.inputs(torch.float32),
        case.input_lengths,
        case.targets,
        case.target_lengths,
        case.blank,
        0.0,
        "cpp",
        False,
    )
    torch.library.opcheck(torch_op.forward, (*arguments, True))
    torch.library.opcheck(
        torch_op.forward, (*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments), False)
    )
    with torch.no_grad():
        loss, _, lse, _, _, log_mass, label_gradient = torch_op.forward(*arguments, True)
        kept = torch_op.SavedForBackward(loss, lse, log_mass, label_gradient)
        for wanted in ((True, True, True), (True, False, False)):
            torch.library.opcheck(
                torch_op.backward,
                (torch.ones(2), *arguments[:7], *kept, *arguments[7:], *wanted),
                test_utils=("test_schema", "test_faketensor"),
            )


@needs_cpp
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(compiler):
    case = peaked(2, 20, 8, 600, 3, sharpness=3.0, extra_row=True)
    leaves = case.inputs(torch.float32)

    def step(hidden, weight, extra_row):
        results = run(case, (hidden * 1.0, weight, extra_row), "auto")
        return results[0].sum(), results[1]

    eager, argmax = step(*leaves)
    expected = torch.autograd.grad(eager, leaves)
    loss, compiled_argmax = torch.compile(step, fullgraph=True, backend=compiler)(*leaves)
    torch.testing.assert_close(loss, eager)
    assert torch.equal(argmax, compiled_argmax)
    for found, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_autocast(implementation):
    """bfloat16 products on float32 parameters, float32 gradients: as on the rounded hidden frames."""
    case = peaked(2, 20, 8, 600, 3, sharpness=2.0, extra_row=True)
    leaves = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(case, leaves, implementation, skip_below=0.0)
    assert results[0].dtype == torch.float32
    found = torch.autograd.grad(results[0].sum(), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for actual, wanted in zip(found, ordinary(case, *leaves)[1], strict=True):
        assert (actual - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(implementation, reentrant):
    case = peaked(2, 20, 8, 600, 3, sharpness=3.0)
    leaves = case.inputs(torch.float32)[:2]

    def loss(hidden, weight):
        return run(case, (hidden, weight, None), implementation)[0].sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted)


@needs_cpp
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_holds_no_logits():
    """4,000 frames x 30,000 tokens are 480 MB of logits; forward and backward grow the process by less than a
    tenth of that."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 1000, 8, requires_grad=True), torch.randn(30_000, 8, requires_grad=True)
    lengths, targets = torch.full((4,), 1000), torch.randint(29_999, (4, 20))

    def memory(name: str) -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )

    def step():
        linear_ctc(hidden, weight, lengths, targets, torch.full((4,), 20), 29_999, implementation="cpp")[
            0
        ].backward()

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    step()
    assert memory("VmHWM") - before < 48 * 1024
