"""The alignment adapter and its CTC head: encoder frames to vectors that predict the LLM's tokens.

    features [A, T, E] -> stack n frames -> Linear -> pre-norm Transformer layer(s) -> LayerNorm -> hidden [A,
    T/n, D] CTC head: hidden x (the LLM's output embeddings, one blank row) -> loss and argmax, without T x
    |V| logits (model.ops)

The LayerNorm's gain starts so small that the first logits have a standard deviation of 1 at most (0.31 for
SmolLM2-135M, whose output embeddings have an RMS of 0.136; 1 for Llama-3.1-8B): from gain 1, SmolLM2's first
frames cost about ln V + 3.3^2 / 2 = 16 nats instead of 11. The blank's row starts random on the embeddings'
scale. Their mean would be a poor start: every token shares that direction, so a frame cannot choose the blank
without raising them all. What the LLM reads passes another LayerNorm, in the shrinking adapter, which has the
scale of the input embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model import ops
from model.config import AlignmentConfig, OpsConfig, OptionError
from model.dropout import KeyedDropout, dropped_frames, position_keys


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm whose gain starts at a value of choice (set in the constructor: under ZeRO-3 that is the last
    moment)."""

    def __init__(self, width: int, gain: float):
        super().__init__(width)
        with torch.no_grad():
            self.weight.fill_(gain)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)); x + feed-forward(norm(x)), with ReLU:
    `nn.TransformerEncoderLayer(norm_first=True)`.

    Written out because torch's own reads the weights of its parts directly, which ZeRO-3 has not gathered
    then.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, attention: str, name: str):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.drop_frames, self.drop_mixed, self.drop_inner, self.drop_out = (
            KeyedDropout(dropout, f"{name}.{place}") for place in ("frames", "mixed", "inner", "out")
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def attend(self, x: torch.Tensor, valid: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [A, T, H, d]
        value = dropped_frames(self.drop_frames, value, keys)
        if self.attention == "frame":  # softmax over the frame alone is 1: the value itself
            mixed = value
        else:
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=valid[:, None, None],
            ).transpose(1, 2)
        return self.out(mixed.flatten(2))

    def forward(self, x: torch.Tensor, valid: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """x [A, T, D], valid [A, T] bool, keys [A, T] of dropout -> [A, T, D]"""
        x = x + self.drop_mixed(self.attend(self.norm1(x), valid, keys), keys)
        inner = self.drop_inner(F.relu(self.up(self.norm2(x))), keys)
        return x + self.drop_out(self.down(inner), keys)


class AlignmentAdapter(nn.Module):
    def __init__(
        self, config: AlignmentConfig, encoder_width: int, width: int, llm_heads: int, gain: float = 1.0
    ):
        super().__init__()
        heads = config.heads or llm_heads
        if width % heads:
            raise OptionError(
                f"model.alignment.heads = {heads} does not divide the LLM's width {width}: set it in the "
                f"recipe"
            )
        self.stack = config.stack_frames
        self.projection = nn.Linear(self.stack * encoder_width, width)
        self.layers = nn.ModuleList(
            TransformerLayer(
                width,
                heads,
                round(config.ffn_multiple * width),
                config.dropout,
                config.attention,
                f"alignment.layers.{layer}",
            )
            for layer in range(config.layers)
        )
        self.norm = ScaledLayerNorm(width, gain)

    def forward(
        self, features: torch.Tensor, lengths: torch.Tensor, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features [A, T, E], lengths [A] -> hidden [A, T', D], lengths [A], with T' = ceil(T / stack).
        Padding does not affect the result; hidden is zero there. keys [A]: the utterances' keys of dropout,
        needed in training."""
        positions = torch.arange(features.shape[1], device=features.device)
        features = features.masked_fill((positions >= lengths[:, None])[..., None], 0.0)
        features = F.pad(features, (0, 0, 0, -features.shape[1] % self.stack))
        stacked = features.unflatten(1, (-1, self.stack)).flatten(2)
        lengths = torch.div(lengths + self.stack - 1, self.stack, rounding_mode="floor")
        valid = torch.arange(stacked.shape[1], device=features.device) < lengths[:, None]
        hidden = self.projection(stacked.to(self.projection.weight.dtype))
        keys = None if keys is None else position_keys(keys, hidden.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, valid, keys)
        return self.norm(hidden).masked_fill(~valid[..., None], 0.0), lengths


class CTCHead(nn.Module):
    """Linear over the LLM's vocabulary and the blank, without bias; it owns its weight, so ZeRO-3 gathers it
    here.

    tied         `weight` is the LLM's output embeddings [V, D], frozen (the very same parameter where the LLM
                 is loaded); `blank_row` [D] is trained and starts random, on their scale. The blank is index
                 V, whatever number `<audio_patch>` has in the tokenizer (a vocabulary may be padded beyond
                 it).
    initialised  `weight` [V', D] starts as a copy of these rows (the blank's row: random), and is trained
    free         `weight` [V', D] starts random, and is trained (as in the official checkpoint)
    """

    def __init__(
        self,
        kind: str,
        embeddings: torch.Tensor | nn.Parameter,
        row_scale: float,
        audio_id: int,
        ops_config: OpsConfig,
    ):
        """embeddings [V, D]: the output embeddings' parameter to share, or a tensor to own; row_scale: their
        RMS (given, because a ZeRO-3 partition cannot be measured here); audio_id: of `<audio_patch>`
        in the tokenizer."""
        super().__init__()
        self.kind, self.ops_config = kind, ops_config
        self.weight: nn.Parameter
        self.blank_row: nn.Parameter | None
        rows, width = getattr(
            embeddings, "ds_shape", embeddings.shape
        )  # a ZeRO-3 partition knows its whole shape
        if kind == "tied":
            shared = embeddings if isinstance(embeddings, nn.Parameter) else None
            self.weight = nn.Parameter(embeddings, requires_grad=False) if shared is None else shared
            self.blank_row = nn.Parameter(row_scale * torch.randn(width, device=embeddings.device))
            self.blank = rows
        elif kind in ("initialised", "free"):
            start = torch.empty(max(rows, audio_id + 1), width, device=embeddings.device)
            if kind == "free":
                nn.init.normal_(start, std=width**-0.5)
            else:
                start[:rows] = embeddings.detach()
                start[rows:] = row_scale * torch.randn(start.shape[0] - rows, width, device=embeddings.device)
                start[audio_id] = row_scale * torch.randn(width, device=embeddings.device)
            self.weight, self.blank_row, self.blank = nn.Parameter(start), None, audio_id
        else:
            raise OptionError(f"model.alignment.ctc_head is '{kind}': tied, initialised or free")

    def forward(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor,
        targets: torch.Tensor | None = None,
        target_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [A, T, D], lengths [A], targets [A, U], target_lengths [A] ->
        (loss [A] each divided by its target length, argmax [A, T], its log-probability [A, T], the blank's
        [A, T]). Without targets the loss is zero and the vocabulary is swept for the argmax alone."""
        # Whatever their types, the op converts a tile at a time: a copy of the weight would outlive ZeRO-3's
        # gather.
        weight, row = self.weight, self.blank_row
        how = {"implementation": self.ops_config.implementation}
        if targets is None or target_lengths is None:
            argmax, lse, top, blank = ops.linear_argmax(
                hidden, weight, lengths, blank=self.blank, extra_row=row, **how
            )
            loss = lse.new_zeros(lse.shape[0])
        else:
            loss, argmax, lse, top, blank = ops.linear_ctc(
                hidden,
                weight,
                lengths,
                targets,
                target_lengths,
                self.blank,
                reduction="none",
                zero_infinity=True,
                extra_row=row,
                skip_below=self.ops_config.skip_below,
                deterministic=self.ops_config.deterministic,
                **how,
            )
            loss = loss / target_lengths.clamp(min=1)
        return loss, argmax, top - lse, blank - lse

    def label_scores(
        self, hidden: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [A, T, D], lengths [A], targets [A, U] -> log-probabilities of the targets [A, T, U] and of
        the blank [A, T], in fp32; nothing of the vocabulary's size is stored."""
        return ops.label_scores(
            hidden,
            self.weight,
            lengths,
            targets,
            self.blank,
            extra_row=self.blank_row,
            implementation=self.ops_config.implementation,
        )

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] of one utterance -> [T, V'] log-probabilities, the blank's in column `blank`, in
        fp32. All at once: 4 bytes x T x V' (0.2 GB for 30 s over Llama's vocabulary)."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        if self.blank_row is not None:
            logits = torch.cat(
                [logits, hidden.to(logits.dtype) @ self.blank_row.to(logits.dtype)[:, None]], dim=1
            )
        return logits.float().log_softmax(-1)
