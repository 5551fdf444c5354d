"""Memory of one rank in a training step, from sizes alone.

Activations come from a trace: the model's own forward and backward run on the meta device, where tensors
have sizes and no contents, and the lifetime of every storage is followed. The parts whose contents decide
sizes (the CTC op, the choice of frames) are replaced by allocations of the sizes that they have. Weights,
gradients and optimizer states are those of DeepSpeed (`states_per_rank`). benchmarks/memory_model.py compares
the sum with the allocator's peak.
"""

from __future__ import annotations

import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.dropout import KeyedDropout
from model.encoder import WhisperEncoder
from model.language_model import HeadCrossEntropy, base_of, token_keys_in_use
from model.lora_init import starts
from model.losses import LOSSES
from model.ops import lookback
from model.ops.torch_op import TILE
from model.quantised import saving
from model.soundwave import Soundwave
from recipe.config import Recipe
from recipe.stages import losses_of, stage_of
from stream.worst_case import TOKENS_PER_SECOND, micro_batch_shape
from train import deepspeed_config
from train.flops import numel

REDUCED_AT_ONCE = 500_000_000  # gradients in a bucket of DeepSpeed's engine
LOGITS_AT_ONCE = 1 << 24  # of the CTC op on a GPU (model/ops/triton_backend.py)


def states_per_rank(trained: int, frozen: int, ranks: int, zero_stage: int, weight_bytes: int) -> float:
    """Bytes of weights, gradients (fp32) and optimizer states (fp32 master, two moments) on a rank
    (Rajbhandari et al., 2020, figure 1, with frozen weights beside the trained ones). DeepSpeed keeps masters
    of fp32 weights, too."""
    weights = weight_bytes * (trained + frozen)
    gradients = 4 * trained
    states = 12 * trained
    return {
        1: weights + gradients + states / ranks,
        2: weights + (gradients + states) / ranks,
        3: (weights + gradients + states) / ranks,
    }[zero_stage]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank.

    gathered: ZeRO-3's whole weights in use, or a dequantised weight; buckets: of gradients on their way;
    update: what the reduction of gradients and the optimizer make for a while, when the activations are gone.
    """

    states: float
    gathered: float
    buckets: float
    activations: float
    update: float

    @property
    def total(self) -> float:
        return self.states + max(self.gathered + self.buckets + self.activations, self.update)


class LiveBytes(TorchDispatchMode):
    """Follow the storages that are made within it: bytes now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        if func is torch.ops.aten.logsumexp.default:  # its kernel makes exp(x - max) of x's size
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes()

        def released(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, released)
        self.now += size
        self.peak = max(self.peak, self.now)

    def exclude(self, tensors) -> None:
        """Do not count these: parameters, which are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)


class _Attention(torch.autograd.Function):
    """The tensors of fused attention: query, key, value, output and the mask in their dtype are kept, the
    scores never exist."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        mask = query.new_empty(mask.shape) if mask is not None else None
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@contextmanager
def fused_attention(on_gpu: bool):
    """Replace scaled_dot_product_attention, which on meta would choose the form that stores the scores. On a
    GPU FlashAttention is assumed, which needs no mask.

    A TorchFunctionMode would not do: it is off where checkpointing computes a layer again in backward.
    """
    name = "scaled_dot_product_attention"
    before = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, **options):
        return _Attention.apply(query, key, value, None if on_gpu else attn_mask)

    for place in (F, lookback):
        setattr(place, name, fused)
    try:
        yield
    finally:
        for place in (F, lookback):
            setattr(place, name, before)


class _ZeRO3Linear(torch.autograd.Function):
    """DeepSpeed's linear layer under ZeRO-3 (memory_efficient_linear) keeps its input, though the weight is
    frozen: deepspeed/runtime/zero/linear.py, 0.19.8."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, weight.new_empty(weight.shape[0]) if ctx.needs_input_grad[2] else None


@contextmanager
def zero3_linear(enabled: bool):
    """Replace the linear layers' function by DeepSpeed's under ZeRO-3."""
    before = F.linear
    if enabled:
        setattr(F, "linear", lambda x, weight, bias=None: _ZeRO3Linear.apply(x, weight, bias))  # noqa: B010
    try:
        yield
    finally:
        setattr(F, "linear", before)  # noqa: B010


class _CTC(torch.autograd.Function):
    """The tensors of the fused CTC op (model/ops): masses of tiles and label gradients are kept; a tile of
    logits and, in backward, an fp32 gradient of the frames exist for a while."""

    @staticmethod
    def forward(ctx, hidden, weight, row, labels, on_gpu):
        batch, length, _ = hidden.shape
        frames, rows = batch * length, weight.shape[0]
        fp32 = {"dtype": torch.float32}
        log_mass = hidden.new_empty(frames, -(-rows // TILE), **fp32)
        # The largest logit and its token of each tile exist in forward only.
        best = hidden.new_empty(frames, -(-rows // TILE), 2, **fp32) if on_gpu else None
        occupancy = hidden.new_empty(batch, length, labels + 1, **fp32)
        alpha = hidden.new_empty(batch, length, 2 * (labels + 1), **fp32)
        label_gradient = hidden.new_empty(batch, length, labels + 1, **fp32)
        logits = hidden.new_empty(min(LOGITS_AT_ONCE, frames * rows) if on_gpu else 0)
        del best, occupancy, alpha, logits
        ctx.save_for_backward(hidden, weight, log_mass, label_gradient)
        ctx.on_gpu, ctx.has_row = on_gpu, row is not None
        return hidden.new_empty(batch, **fp32)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, *_ = ctx.saved_tensors
        of_frames = torch.empty_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        logits = hidden.new_empty(
            min(LOGITS_AT_ONCE, hidden.shape[0] * hidden.shape[1] * weight.shape[0]) if ctx.on_gpu else 0
        )
        del logits
        of_row = hidden.new_empty(hidden.shape[-1]) if ctx.has_row else None
        return of_frames.to(hidden.dtype), of_weight, of_row, None, None


@contextmanager
def _dropout_as_on(model: Soundwave, on_gpu: bool):
    """On a GPU the masks of dropout are computed again in backward (model/ops/dropout.py): nothing is
    kept."""
    places = [m for m in model.modules() if isinstance(m, KeyedDropout)] if on_gpu else []
    rates = [place.p for place in places]
    for place in places:
        place.p = 0.0
    try:
        yield
    finally:
        for place, rate in zip(places, rates, strict=True):
            place.p = rate


def _encode(model: Any, clips: int, seconds: float, dtype: torch.dtype) -> torch.Tensor:
    """Features [clips, T, width] of the encoder, its layers run on meta."""
    encoder = model.encoder
    frames = math.ceil(seconds * encoder.frame_rate)
    with torch.set_grad_enabled(encoder.learns):
        if not isinstance(encoder, WhisperEncoder):
            sizes = encoder.input_sizes(int(seconds * 16000))
            return encoder.layers(torch.empty(clips, *sizes, device="meta", dtype=dtype)).last_hidden_state
        net = encoder.layers
        mel = torch.empty(clips, net.config.num_mel_bins, 2 * frames, device="meta")
        hidden = F.gelu(net.conv1(mel.to(dtype)))
        hidden = F.gelu(net.conv2(hidden)).transpose(1, 2) + net.embed_positions.weight[0]
        for layer in net.layers:
            hidden = layer(hidden, None)
        return net.layer_norm(hidden)


def _llm_loss(model: Any, x: torch.Tensor, targets: int, on_gpu: bool) -> torch.Tensor:
    """x [B, L, D] -> cross-entropy at that many positions. The rows are equally long, so SDPA takes them as
    they are, with a mask [B, 1, L, L]; FlashAttention takes them joined, without."""
    base: Any = base_of(model.llm)
    rows, length = x.shape[:2]
    keys = torch.empty(rows, length, device="meta", dtype=torch.int64)
    # A mask of four dimensions is taken as it is: transformers would look into one that it makes.
    square = 1 if on_gpu else length
    mask = torch.empty(rows, 1, square, square, device="meta", dtype=torch.bool)
    with token_keys_in_use(model.llm, keys):
        decoder = base.get_decoder()
        hidden = decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    head = base.get_output_embeddings().weight
    at = torch.empty(targets, device="meta", dtype=torch.int64)
    rows_of_targets = hidden.flatten(0, 1)[at]
    if head.requires_grad:  # all logits of the targets exist
        return F.cross_entropy((rows_of_targets @ head.t()).float(), at, reduction="sum")
    return HeadCrossEntropy.apply(rows_of_targets, head, at)


def activation_bytes(
    model: Soundwave,
    recipe: Recipe,
    *,
    micro_batch_seconds: float,
    tokens: int,
    zero_stage: int,
    kept: int | None = None,
    on_gpu: bool = True,
) -> int:
    """Peak bytes of one micro-batch's forward and backward beside weights, gradients and states.

    model: on the meta device, stage set (train.dry_run.meta_model). The micro-batch is that of
    stream/worst_case.py: as many of the longest clips as fit, conversations that fill `tokens`, and
    beside these the frames that are kept. kept: of each clip; default: every frame.
    """
    stage = stage_of(recipe)
    dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    model.to(dtype).train()
    if recipe.optim.activation_checkpointing:
        model.enable_activation_checkpointing()
    clips, seconds = micro_batch_shape(recipe.data, micro_batch_seconds)
    labels = int(seconds * TOKENS_PER_SECOND)
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    live = LiveBytes()
    live.exclude([*model.parameters(), *model.buffers()])
    uses_ctc = any(LOSSES[name].uses_ctc for name in losses_of(recipe))
    try:
        with _dropout_as_on(model, on_gpu), live, fused_attention(on_gpu), zero3_linear(zero_stage == 3):
            # The waveforms stay for the whole step.
            waves = torch.empty(clips, int(seconds * 16000), device="meta")
            if model.encoder is not None:
                features = _encode(model, clips, seconds, dtype)
            else:
                frames = math.ceil(seconds * 50)
                width = model.alignment.projection.in_features // model.alignment.stack
                features = torch.empty(clips, frames, width, device="meta", dtype=dtype)
            lengths = torch.empty(clips, device="meta", dtype=torch.int64)
            keys = torch.empty(clips, device="meta", dtype=torch.int64)
            hidden, lengths = model.alignment(features, lengths, keys)
            loss = torch.zeros((), device="meta")
            head = model.ctc_head
            if uses_ctc:
                loss = loss + _CTC.apply(hidden, head.weight, head.blank_row, labels, on_gpu).sum()
            if stage.needs_llm:
                frames = hidden.shape[1] if kept is None else kept
                places = torch.empty(clips, frames, device="meta", dtype=torch.int64)
                shrinking = model.shrinking
                compress = getattr(shrinking, "compress", None)
                short = compress(hidden, lengths, places, lengths, keys) if compress else hidden[:, :frames]
                # The frames come on top of the conversations' own positions.
                text = torch.empty(
                    clips, max(tokens // clips, 1), hidden.shape[-1], device="meta", dtype=dtype
                )
                spliced = torch.cat([text, short], dim=1)
                # ZeRO-3 and checkpointing ask for the gradient of the LLM's input (train/deepspeed_fixes).
                if not spliced.requires_grad and (zero_stage == 3 or recipe.optim.activation_checkpointing):
                    spliced.requires_grad_(True)
                loss = loss + _llm_loss(model, spliced, tokens, on_gpu)
            if loss.requires_grad:
                loss.backward()
            del waves
    finally:
        for handle in handles:
            handle.remove()
    return live.peak


def offloads_weights(config: dict) -> bool:
    return (config["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"


def rank_memory(
    model: Soundwave,
    recipe: Recipe,
    ranks: int,
    zero_stage: int,
    config: dict,
    activations: float,
) -> RankMemory:
    """The sum on one rank. config: from train.deepspeed_config.resolve; activations: `activation_bytes`."""
    sizes = [(numel(p), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, learns in sizes if learns)
    frozen = sum(n for n, learns in sizes if not learns)
    weight_bytes = 2 if recipe.model.dtype == "bfloat16" else 4
    states = states_per_rank(trained, frozen, ranks, zero_stage, weight_bytes)
    # Buffers, whole on every rank.
    states += weight_bytes * sum(start.numel() for start in starts(model).values())
    quantised = saving(model.llm, recipe.model.llm.quantization, weight_bytes)
    states -= quantised.saved
    average = 4 * trained / ranks if recipe.optim.ema_decay is not None else 0.0  # beside the masters
    states += average
    section = config["zero_optimization"]
    gathered = quantised.largest  # a dequantised weight at a time
    if zero_stage == 3:
        live = min(trained + frozen, section.get("stage3_max_live_parameters", 1e9))
        gathered = weight_bytes * live
    bucket = section.get("reduce_bucket_size", 5e8)
    bucket = bucket if isinstance(bucket, (int, float)) else 5e8
    buckets = weight_bytes * min(trained, bucket)
    # AdamW's partition of gradients in fp32, and a temporary of the same size.
    update = 8 * trained / ranks
    if zero_stage == 1 and weight_bytes == 2:  # fp32 gradients are flattened, and cast to bf16 to be reduced
        update = max(update, (4 + weight_bytes) * min(trained, REDUCED_AT_ONCE))
    if deepspeed_config.offloads_optimizer(config):
        states -= 12 * trained / ranks + average
        update = 0.0
    if offloads_weights(config):
        states -= weight_bytes * (trained + frozen) / ranks
    return RankMemory(states, gathered, buckets, activations, update)
