"""The public face of the fused op: arguments checked, an implementation chosen, the reduction applied."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from . import cpp_backend, reference, torch_op

IMPLEMENTATIONS = ("auto", "cpp", "triton", "reference")


def default_skip_below(dtype: torch.dtype) -> float:
    """Return the softmax mass below which backward uses a tile's mean row for a (frame, tile) pair.

    The bound of the error, and how the value was chosen: docs/internals/fused-op.md.
    """
    return {torch.float64: 0.0, torch.float32: 2.0**-19}.get(dtype, 2.0**-12)


def linear_ctc(
    hidden: Tensor,
    weight: Tensor,
    input_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    reduction: str = "mean",
    zero_infinity: bool = True,
    extra_row: Tensor | None = None,
    skip_below: float | None = None,
    implementation: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CTC loss over softmax(hidden @ weight.T) without the logits.

    hidden [B, T, D]; weight [V, D]; input_lengths [B] in frames; targets [B, U] token ids, padded with
    anything; target_lengths [B]. Words mean what they mean in torch.nn.functional.ctc_loss: `reduction`
    "none" (loss [B]), "sum", or "mean" (each loss divided by its target length, at least 1, then the mean; 0
    for an empty batch); `zero_infinity` sets impossible alignments (frames < labels + adjacent repeats) to
    zero. Their gradient is zero with and without it.

    extra_row [D] is one more row of the vocabulary, with index V, which must then be the blank: the trained
    blank beside a frozen embedding. skip_below: (frame, vocabulary tile) pairs whose softmax mass is below it
    contribute that mass times the mean row of the tile to the gradient (default 2^-19 in float32, 2^-12 in
    bfloat16; 0: exact; bound: docs/internals/fused-op.md). Products run in hidden's dtype, or autocast's; a
    weight of another dtype is converted tile by tile. Sums and the recursion are float32 or better.

    implementation: "cpp" (CPU), "triton" (CUDA), "reference" (plain PyTorch, anywhere, any floating dtype),
    or "auto": the fastest that is there. Each gives the same result run after run on the CPU; `deterministic`
    makes CUDA's matrix products do so too (torch.use_deterministic_algorithms around them, which asks for
    CUBLAS_WORKSPACE_CONFIG to be set).

    Returns loss; argmax [B, T] int64; lse, largest logit and blank's logit [B, T] float32. Only the loss has
    a gradient (hidden, weight, extra_row). A frame past its utterance's length reads as a certain blank
    (argmax blank, the others 0).

    Errors: ValueError naming the argument, or the utterance (row of the batch) whose target equals the blank
    or lies outside the vocabulary, or whose lengths do not fit. Source: Graves et al., ICML 2006; equations
    in docs/internals/fused-op.md.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"linear_ctc: reduction='{reduction}' is unknown: give 'none', 'mean' or 'sum'")
    hidden, input_lengths = _checked(hidden, weight, input_lengths, blank, extra_row)
    if targets.dim() != 2 or targets.shape[0] != hidden.shape[0] or target_lengths.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_ctc: targets {tuple(targets.shape)} and target_lengths {tuple(target_lengths.shape)} "
            f"must be "
            f"[B, U] and [B] with B = {hidden.shape[0]}"
        )
    targets, target_lengths = targets.to(hidden.device), target_lengths.to(hidden.device)
    if skip_below is None:
        skip_below = default_skip_below(hidden.dtype)
    problem = torch_op.CTCInputs(hidden, weight, extra_row, input_lengths, targets, target_lengths, blank)
    loss, *frames = _run(problem, float(skip_below), implementation, deterministic)
    if zero_infinity:
        loss = torch.where(loss == torch.inf, 0.0, loss)
    if reduction == "mean":
        loss = (loss / target_lengths.clamp(min=1)).sum() / max(loss.shape[0], 1)
    elif reduction == "sum":
        loss = loss.sum()
    argmax, lse, max_logit, blank_logit = frames
    return loss, argmax, lse, max_logit, blank_logit


@torch.no_grad()
def linear_argmax(
    hidden: Tensor,
    weight: Tensor,
    input_lengths: Tensor,
    *,
    blank: int,
    extra_row: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sweep alone: argmax [B, T] int64, and lse, largest logit, blank's logit [B, T] float32. Arguments
    as linear_ctc."""
    hidden, input_lengths = _checked(hidden, weight, input_lengths, blank, extra_row)
    none = input_lengths.new_zeros((hidden.shape[0], 0))
    problem = torch_op.CTCInputs(
        hidden, weight, extra_row, input_lengths, none, torch.zeros_like(input_lengths), blank
    )
    _, argmax, lse, max_logit, blank_logit = _run(problem, 0.0, implementation, False)
    return argmax, lse, max_logit, blank_logit


def _checked(
    hidden: Tensor, weight: Tensor, input_lengths: Tensor, blank: int, extra_row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check shapes; return hidden in the dtype of the products."""
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"linear_ctc: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: they "
            f"must be "
            "[B, T, D] and [V, D]"
        )
    if extra_row is not None and (extra_row.shape != weight.shape[1:] or blank != weight.shape[0]):
        raise ValueError(
            f"linear_ctc: extra_row {tuple(extra_row.shape)} must be [D] = [{weight.shape[1]}], and blank "
            f"{blank} "
            f"its index V = {weight.shape[0]}"
        )
    vocabulary = weight.shape[0] + (extra_row is not None)
    if not 0 <= blank < vocabulary:
        raise ValueError(f"linear_ctc: blank {blank} lies outside the vocabulary of {vocabulary} tokens")
    if input_lengths.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_ctc: input_lengths {tuple(input_lengths.shape)} must be [B] = [{hidden.shape[0]}]"
        )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, input_lengths.to(hidden.device)


@torch.compiler.assume_constant_result
def _choose(implementation: str, device: str, dtype: torch.dtype) -> str:
    """Which implementation runs on this device and dtype. Errors: ValueError, where the asked one cannot."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"linear_ctc: implementation='{implementation}' is unknown: give one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        if dtype == torch.float64:
            return "reference"
        if device == "cpu":
            return "cpp" if cpp_backend.available() else "reference"
        return "triton" if device == "cuda" and _has_triton() else "reference"
    if implementation == "cpp" and (device != "cpu" or dtype == torch.float64 or not cpp_backend.available()):
        raise ValueError(
            f"linear_ctc: implementation='cpp' runs on CPU tensors up to float32 where a C++ compiler is; "
            f"these are "
            f"{dtype} on {device}: choose 'auto'"
        )
    if implementation == "triton" and (dtype == torch.float64 or not _has_triton()):
        raise ValueError(
            f"linear_ctc: implementation='triton' needs the triton package and tensors up to float32; these "
            f"are "
            f"{dtype} on {device}: choose 'auto'"
        )
    return implementation


def check_implementation(implementation: str, device: str) -> None:
    """Whether `implementation` can run on a type of device. Errors: ValueError, one line."""
    _choose(implementation, device, torch.float32)


def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "the fused op runs on its slow plain PyTorch reference: triton is not installed", stacklevel=2
    )
    return False


def _run(
    problem: torch_op.CTCInputs, skip_below: float, implementation: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [B] (inf where impossible), and the four [B, T] results."""
    hidden, weight, extra_row, *_ = problem
    implementation = _choose(implementation, hidden.device.type, hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if implementation == "reference":
            problem.check_values()
            return reference.linear_ctc(
                *problem._replace(targets=problem.targets.masked_fill(~problem.is_label(), 0))
            )
        with_gradient = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (hidden, weight, extra_row)
        )
        return torch_op.forward(*problem, skip_below, implementation, deterministic, with_gradient)[:5]
