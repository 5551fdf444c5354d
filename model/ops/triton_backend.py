"""The Triton backend: CUDA (and, under TRITON_INTERPRET=1, any tensor, for tests).

The matrix products are cuBLAS's, on tiles whose logits fit the L2 cache; a Triton kernel reads each
tile while it is there. Another holds CTC's recursion, one program an utterance. Every sum has one fixed
order.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_op import TILE, CTCInputs, SavedForBackward

# Logits that exist at one time: 2^24 are 32 MB in bfloat16; an H100's L2 cache holds 50 MB.
LOGITS_AT_ONCE = 2**24
LOG_ZERO = tl.constexpr(-1e30)

# Rows of a program; each holds one tile of theirs. Nothing is tuned at run time: the width of a product
# follows the number of frames, so it would be tuned again and again (on an H200 the first 23 steps of the
# quick start's stage 1 took 1.4 s each), and what was chosen would decide the order of sums.
ROWS = tl.constexpr(4)


# Numbers that follow the batch are not specialised: each kind would be compiled anew, in the middle
# of training.
@triton.jit(do_not_specialize=["rows", "first_row", "first_token", "tiles", "first_tile"])
def _statistics(
    logits,
    log_mass,
    best_value,
    best_token,
    rows,
    first_row,
    first_token,
    width,
    tiles,
    first_tile,
    TILE_: tl.constexpr,
):
    """Of a tile of logits [rows, width], into its place in [frames, tiles]: log mass, largest logit, the
    token that has it."""
    row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = tile * TILE_ + tl.arange(0, TILE_)
    here = (row < rows)[:, None] & (column < width)[None, :]
    z = tl.load(
        logits + row.to(tl.int64)[:, None] * width + column[None, :], mask=here, other=-float("inf")
    ).to(tl.float32)
    z = tl.where((row < rows)[:, None], z, 0.0)
    top = tl.max(z, axis=1)
    place = (first_row + row).to(tl.int64) * tiles + first_tile + tile
    tl.store(log_mass + place, top + tl.log(tl.sum(tl.exp(z - top[:, None]), axis=1)), mask=row < rows)
    tl.store(best_value + place, top, mask=row < rows)
    tl.store(best_token + place, first_token + tile * TILE_ + tl.argmax(z, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _probabilities(logits, lse, scale, rows, width, TILE_: tl.constexpr):
    """logits [rows, width] <- exp(logits - lse) * scale, in place; lse and scale [rows]."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TILE_ + tl.arange(0, TILE_)
    shift = tl.load(lse + row, mask=row < rows, other=0.0)
    factor = tl.load(scale + row, mask=row < rows, other=0.0)
    here = (row < rows)[:, None] & (column < width)[None, :]
    at = logits + row.to(tl.int64)[:, None] * width + column[None, :]
    z = tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, (tl.exp(z - shift[:, None]) * factor[:, None]).to(logits.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first_token", "length", "slots"])
def _label_logits(
    logits, frame, tokens, values, first_token, width, length, slots, SLOTS: tl.constexpr, PLACE: tl.constexpr
):
    """Between logits [rows, width] of the tokens from first_token on, and values [B * T, slots] of the tokens
    [B, slots] of each utterance (-1: none; none stands twice): values are taken from the logits, or, with
    PLACE, put in their stead. frame [rows]: the rows' places in `values`."""
    row = tl.program_id(0)
    own = tl.load(frame + row)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        place = tl.load(tokens + own // length * slots + slot, mask=slot < slots, other=-1) - first_token
        here = (slot < slots) & (place >= 0) & (place < width)
        at = logits + row.to(tl.int64) * width + place
        if PLACE:
            tl.store(
                at,
                tl.load(values + own * slots + slot, mask=here, other=0.0).to(logits.dtype.element_ty),
                mask=here,
            )
        else:
            tl.store(values + own * slots + slot, tl.load(at, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _log_add(a, b, c):
    top = tl.maximum(tl.maximum(a, b), c)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top) + tl.exp(c - top))


@triton.jit(do_not_specialize=["length", "labels", "width"])
def _recursion(
    logprob,
    targets,
    input_lengths,
    target_lengths,
    loss,
    occupancy,
    alpha,
    beta,
    length,
    labels,
    width,
    STATES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """CTC's forward-backward recursion, one utterance a program (Graves et al., ICML 2006, equations 6 to
    14).

    logprob [B, T, U + 1] (labels, then blank); alpha [B, T, width] scratch (two frames are enough without
    gradient) and beta [B, 2, width], filled with LOG_ZERO: state s lies at s + 2, so that its neighbours
    below and above exist. Each frame's alpha is kept relative to its largest; `total` sums what was taken
    away. A state reads its neighbours from memory, after a barrier.
    """
    b = tl.program_id(0).to(tl.int64)
    frames = tl.load(input_lengths + b)
    u = tl.load(target_lengths + b)
    count = 2 * u + 1
    s = tl.arange(0, STATES)
    real = s < count
    is_label = (s % 2) == 1
    position = tl.where(is_label, s // 2, labels)
    token = tl.load(targets + b * labels + s // 2, mask=real & is_label, other=-1)
    before = tl.load(targets + b * labels + s // 2 - 1, mask=real & is_label & (s > 1), other=-1)
    after = tl.load(targets + b * labels + s // 2 + 1, mask=is_label & (s + 2 < count), other=-1)
    enter = is_label & (s > 1) & (token != before)
    leave = is_label & (s + 2 < count) & (token != after)
    source = logprob + b * length * (labels + 1) + position
    rows = length if WITH_GRADIENT else 2
    own_alpha = alpha + b * rows * width + s + 2
    own_beta = beta + b * 2 * width + s + 2

    total = 0.0
    impossible = (frames == 0) & (u > 0)
    for t in range(0, frames):
        emission = tl.load(source + t * (labels + 1), mask=real, other=0.0)
        if t == 0:
            now = tl.where(s < 2, 0.0, LOG_ZERO)
        else:
            last = own_alpha + ((t - 1) % rows) * width
            third = tl.load(last - 2)
            now = _log_add(tl.load(last), tl.load(last - 1), tl.where(enter, third, LOG_ZERO))
        now = tl.where(real, now + emission, LOG_ZERO)
        top = tl.max(now, axis=0)
        total += top
        tl.store(own_alpha + (t % rows) * width, tl.where(now < LOG_ZERO / 2, LOG_ZERO, now - top))
        tl.debug_barrier()

    if frames > 0:
        final = tl.load(own_alpha + ((frames - 1) % rows) * width)
        final = tl.where(real & (s >= count - 2), final, LOG_ZERO)
        end = tl.max(final, axis=0)
        impossible = end < LOG_ZERO / 2
        total += end + tl.log(tl.sum(tl.exp(final - end), axis=0))
    tl.store(loss + b, tl.where(impossible, float("inf"), -total))

    if WITH_GRADIENT:  # noqa: SIM102 (known when the kernel is compiled; the next one is not)
        if (frames > 0) & (impossible == 0):
            for step in range(0, frames):
                t = frames - 1 - step
                if step == 0:
                    now = tl.where(real & (s >= count - 2), 0.0, LOG_ZERO)
                else:
                    following = own_beta + ((step - 1) % 2) * width
                    third = tl.load(following + 2)
                    now = _log_add(
                        tl.load(following), tl.load(following + 1), tl.where(leave, third, LOG_ZERO)
                    )
                    now = tl.where(real, now, LOG_ZERO)
                path = tl.load(own_alpha + t * width) + now
                # At each frame the shares sum to one, whatever constants alpha and beta have dropped.
                share = tl.exp(path - tl.max(path, axis=0))
                share = share / tl.sum(share, axis=0)
                out = occupancy + (b * length + t) * (labels + 1)
                tl.store(out + position, share, mask=real & is_label)
                tl.store(out + labels, tl.sum(tl.where(is_label, 0.0, share), axis=0))
                emission = tl.load(source + t * (labels + 1), mask=real, other=0.0)
                carried = tl.where(real, now + emission, LOG_ZERO)
                carried = tl.where(carried < LOG_ZERO / 2, LOG_ZERO, carried - tl.max(carried, axis=0))
                tl.store(own_beta + (step % 2) * width, carried)
                tl.debug_barrier()


def _products(deterministic: bool):
    """With `deterministic`, torch refuses products that may differ from run to run, and names the setting."""
    if not deterministic:
        return contextlib.nullcontext()
    return _deterministic()


@contextlib.contextmanager
def _deterministic():
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _pieces(frames: int, tiles: int) -> tuple[int, int]:
    """Frames and tokens of one product: all frames where a few tiles of theirs fit, whole tiles."""
    rows = max(1, min(frames, LOGITS_AT_ONCE // (4 * TILE)))
    return rows, TILE * max(1, min(tiles, LOGITS_AT_ONCE // (rows * TILE)))


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS.value), triton.cdiv(width, TILE)


def _own_tokens(problem: CTCInputs) -> tuple[Tensor, Tensor]:
    """tokens [B, U + 1] of each utterance's columns, labels then blank, -1 in the padding and where a label
    stands again; and first [B, U + 1]: the place where each stands first."""
    batch, device = problem.targets.shape[0], problem.targets.device
    blank = problem.targets.new_full((batch, 1), problem.blank)
    tokens = torch.cat([problem.targets.masked_fill(~problem.is_label(), -1), blank], dim=1)
    place = torch.arange(tokens.shape[1], device=device)
    first = torch.where(tokens[:, :, None] == tokens[:, None, :], place, len(place)).amin(dim=2)
    return tokens.masked_fill(first != place, -1), first


def forward(problem: CTCInputs, deterministic: bool, with_gradient: bool):
    with _products(deterministic):
        return _forward(problem, with_gradient)


def _forward(problem: CTCInputs, with_gradient: bool):
    hidden, weight, extra_row, input_lengths, targets, target_lengths, blank = problem
    batch, length, depth = hidden.shape
    device, dtype = hidden.device, hidden.dtype
    valid = torch.arange(length, device=device)[None] < input_lengths[:, None]
    index = valid.flatten().nonzero()[:, 0]
    flat = hidden.reshape(batch * length, depth)
    frames = flat if len(index) == batch * length else flat[index]
    n = len(index)

    tokens, first = _own_tokens(problem)
    slots = tokens.shape[1]
    picked = torch.zeros(batch * length, slots, device=device)
    log_mass = torch.zeros(n, problem.tiles, device=device)
    best_value, best_token = torch.zeros_like(log_mass), torch.zeros_like(log_mass, dtype=torch.int32)
    rows, columns = _pieces(n, problem.tiles)
    buffer = torch.empty(rows * columns if n else 0, device=device, dtype=dtype)
    for v0 in range(0, weight.shape[0] if n else 0, columns):
        part = weight[v0 : v0 + columns].to(dtype)
        for f0 in range(0, n, rows):
            chunk = frames[f0 : f0 + rows]
            count, width = chunk.shape[0], part.shape[0]
            logits = buffer[: count * width].view(count, width)
            torch.mm(chunk, part.t(), out=logits)
            _statistics[_grid(count, width)](
                logits,
                log_mass,
                best_value,
                best_token,
                count,
                f0,
                v0,
                width,
                problem.tiles,
                v0 // TILE,
                TILE_=TILE,
            )
            _label_logits[(count,)](
                logits,
                index[f0 : f0 + rows],
                tokens,
                picked,
                v0,
                width,
                length,
                slots,
                SLOTS=128,
                PLACE=False,
            )

    lse = log_mass.logsumexp(dim=1)
    largest, tile = best_value.max(dim=1)
    argmax = best_token.gather(1, tile[:, None])[:, 0].long()
    if extra_row is not None:
        extra = (frames @ extra_row.to(dtype)).float()
        picked[index, -1] = extra
        lse = torch.logaddexp(lse, extra)
        argmax = torch.where(extra > largest, weight.shape[0], argmax)
        largest = torch.maximum(largest, extra)

    def spread(values: Tensor, fill: float) -> Tensor:
        out = values.new_full((batch * length, *values.shape[1:]), fill)
        out[index] = values
        return out

    lse = spread(lse, 0.0)
    logprob = (
        (picked - lse[:, None]).view(batch, length, slots).gather(2, first[:, None].expand(-1, length, -1))
    )
    loss, label_gradient = _ctc(problem, logprob, with_gradient)
    if with_gradient:
        merge = torch.nn.functional.one_hot(first, slots).to(logprob)
        label_gradient = torch.where((tokens >= 0)[:, None], logprob.exp() - label_gradient @ merge, 0.0)
    return (
        loss,
        spread(argmax, blank).view(batch, length),
        lse.view(batch, length),
        spread(largest, 0.0).view(batch, length),
        picked[:, -1].view(batch, length).clone(),
        log_mass if n == batch * length else spread(log_mass, 0.0),
        label_gradient,
    )


def _ctc(problem: CTCInputs, logprob: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """loss [B]; occupancy [B, T, U + 1], each position of the target and, last, the blank (empty without
    gradient)."""
    batch, length, slots = logprob.shape
    loss = logprob.new_zeros(batch)
    occupancy = logprob.new_zeros((batch, length, slots) if with_gradient else (0, 0, 0))
    if not batch:
        return loss, occupancy
    states = triton.next_power_of_2(2 * slots - 1)
    width = states + 4
    alpha = logprob.new_full((batch, max(length, 1) if with_gradient else 2, width), LOG_ZERO.value)
    beta = logprob.new_full((batch, 2, width), LOG_ZERO.value)
    targets = problem.targets.contiguous() if slots > 1 else problem.target_lengths
    lengths = problem.input_lengths.contiguous(), problem.target_lengths.contiguous()
    _recursion[(batch,)](
        logprob.contiguous(),
        targets,
        *lengths,
        loss,
        occupancy,
        alpha,
        beta,
        length,
        slots - 1,
        width,
        STATES=states,
        WITH_GRADIENT=with_gradient,
        num_warps=min(max(states // 64, 1), 16),
    )
    return loss, occupancy


def computed_pairs(problem: CTCInputs, active: Tensor) -> Tensor:
    """Return which (frame, tile) pairs `backward` computes, [B * T, tiles]: a frame's whole pieces of the
    vocabulary, where one tile of the piece is active."""
    _, width = _pieces(len(active), problem.tiles)
    tiles = width // TILE
    padded = torch.nn.functional.pad(active, (0, -problem.tiles % tiles))
    pieces = padded.view(len(active), -1, tiles).any(dim=2)
    return pieces.repeat_interleave(tiles, dim=1)[:, : problem.tiles]


def backward(
    problem: CTCInputs,
    kept: SavedForBackward,
    loss_gradient: Tensor,
    computed: Tensor,
    deterministic: bool,
    wanted,
):
    with _products(deterministic):
        return _backward(problem, kept, loss_gradient, computed, *wanted)


def _backward(
    problem: CTCInputs,
    kept: SavedForBackward,
    loss_gradient: Tensor,
    computed: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_extra: bool,
):
    hidden, weight, extra_row, input_lengths, *_ = problem
    batch, length, depth = hidden.shape
    device, dtype = hidden.device, hidden.dtype
    flat, lse = hidden.reshape(batch * length, depth), kept.lse.flatten()
    scale = torch.where(kept.loss.isinf(), 0.0, loss_gradient.float())
    frame_scale = scale[:, None].expand(batch, length).reshape(-1)
    valid = (torch.arange(length, device=device)[None] < input_lengths[:, None]).flatten() & (
        frame_scale != 0
    )
    tokens, _ = _own_tokens(problem)
    values = (kept.label_gradient * scale[:, None, None]).flatten(0, 1)

    rows, width = _pieces(batch * length, problem.tiles)
    active = computed[:, :: width // TILE]  # the same for all tiles of a piece
    counts = active.sum(dim=0).tolist()

    grad_hidden = torch.zeros(batch * length, depth, device=device) if want_hidden else None
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if want_weight else None
    buffer = torch.empty(rows * width if any(counts) else 0, device=device, dtype=dtype)
    for piece, count in enumerate(counts):
        v0 = piece * width
        summed: Tensor | None = None  # the weight's gradient over several chunks of frames
        if not count:
            if grad_weight is not None:
                grad_weight[v0 : v0 + width] = 0
            continue
        part = weight[v0 : v0 + width].to(dtype)
        frame = torch.nonzero_static(active[:, piece], size=count)[:, 0]
        for f0 in range(0, count, rows):
            which = frame[f0 : f0 + rows]
            h = flat if count == len(flat) and count <= rows else flat[which]
            gradient = buffer[: len(which) * part.shape[0]].view(len(which), part.shape[0])
            torch.mm(h, part.t(), out=gradient)
            _probabilities[_grid(*gradient.shape)](
                gradient, lse[which], frame_scale[which], *gradient.shape, TILE_=TILE
            )
            _label_logits[(len(which),)](
                gradient,
                which,
                tokens,
                values,
                v0,
                part.shape[0],
                length,
                tokens.shape[1],
                SLOTS=128,
                PLACE=True,
            )
            if grad_hidden is not None:
                grad_hidden[which] += gradient @ part
            if grad_weight is not None:
                product = gradient.t() @ h
                summed = product if summed is None else product.float() + summed
        if grad_weight is not None and summed is not None:
            grad_weight[v0 : v0 + width] = summed

    grad_extra = None
    if extra_row is not None:
        share = values[:, -1].masked_fill(~valid, 0.0)
        if grad_hidden is not None:
            grad_hidden += torch.outer(share, extra_row.float())
        if want_extra:
            index = valid.nonzero()[:, 0]  # padded frames may hold anything
            grad_extra = (share[index].to(dtype) @ flat[index]).to(extra_row.dtype)

    def given(tensor: Tensor | None, like: Tensor | None) -> Tensor:
        if tensor is None or like is None:
            return torch.empty(0, device=device)
        return tensor.to(like.dtype).view(like.shape)

    return given(grad_hidden, hidden), given(grad_weight, weight), given(grad_extra, extra_row)
