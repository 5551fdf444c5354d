"""KL distillation from the same LLM without LoRA, which reads the transcript in place of the audio.

    loss = sum over target positions i of KL(p_i || q_i) = sum_v p_i(v) (log p_i(v) - log q_i(v))
    p_i  the LLM without LoRA, on the conversation with each `<audio_patch>` replaced by its transcript
    q_i  the LLM with LoRA, on the audio: the distribution whose cross-entropy the loss `ce` is

It keeps the text abilities: the LLM answers to the audio what it would have answered to the words. Rows with
an audio that has no transcript do not count; text-only rows do.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import nn

from model.batch import Batch
from model.language_model import LLM, arrange, base_of, embed, splice, target_loss, token_keys_in_use
from model.losses.base import ForwardState, Loss, register_loss

CHUNK_LOGITS = 1 << 23  # logits of one of the two models that exist at once: 32 MiB in fp32


class HeadKL(torch.autograd.Function):
    """student, teacher [N, D], weight [V, D] (frozen), counts [N] -> sum of counts x KL(teacher || student).

    Both distributions are softmax(hidden x weight^T). The first pass over chunks of the vocabulary has, with
    logits s of the student and t of the teacher, log sum exp(s), log sum exp(t) and E_p[t - s], which gives
    KL = E_p[t - s] - lse(t) + lse(s). The second one has the gradient of the student's hidden states,
    (q - p) x weight. N x |V| numbers never exist.
    """

    @staticmethod
    def forward(
        ctx, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        kind = torch.promote_types(student.dtype, torch.float32)
        columns = max(1, CHUNK_LOGITS // max(len(student), 1))
        chunks = [weight[start : start + columns] for start in range(0, weight.shape[0], columns)]
        lowest = torch.finfo(kind).min
        top_s, top_t = (student.new_full((len(student),), lowest, dtype=kind) for _ in range(2))
        sum_s, sum_t, difference = (torch.zeros_like(top_s) for _ in range(3))
        for chunk in chunks:
            s, t = ((hidden @ chunk.t()).to(kind) for hidden in (student, teacher))
            new_s, new_t = torch.maximum(top_s, s.amax(1)), torch.maximum(top_t, t.amax(1))
            sum_s = sum_s * (top_s - new_s).exp() + (s - new_s[:, None]).exp().sum(1)
            p, shrink = (t - new_t[:, None]).exp(), (top_t - new_t).exp()
            sum_t, difference = sum_t * shrink + p.sum(1), difference * shrink + (p * (t - s)).sum(1)
            top_s, top_t = new_s, new_t
        lse_s, lse_t = top_s + sum_s.log(), top_t + sum_t.log()
        loss = (counts * (difference / sum_t - lse_t + lse_s)).sum()
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(student)
            for chunk in chunks:
                q, p = (
                    ((hidden @ chunk.t()).to(kind) - lse[:, None]).exp()
                    for hidden, lse in ((student, lse_s), (teacher, lse_t))
                )
                gradient += ((q - p) * counts[:, None]).to(chunk.dtype) @ chunk
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, of_loss: torch.Tensor):
        return ctx.saved_tensors[0] * of_loss.to(ctx.saved_tensors[0].dtype), None, None, None


@register_loss("kl")
class Distillation(Loss):
    needs_frozen_llm = True

    def numerator(self, state: ForwardState) -> torch.Tensor:
        model, batch, shared = state.model, state.batch, state.shared
        if "target_hidden" not in shared:  # `ce` has not run: the student's forward pass
            target_loss(state.llm, *state.llm_input, batch.row_keys, shared)
        student = shared["target_hidden"]
        if student is None:
            raise ValueError(
                "loss.weights.kl: the output layer of this LLM does more than multiply (a bias, a cap on its "
                "logits), which this loss does not know: remove the loss"
            )
        # A word as frames of one text: the transcript's token ids are the CTC targets.
        text = embed(state.llm, batch.input_ids, model.audio_id)
        words = embed(state.llm, batch.ctc_targets, model.audio_id)
        audios = 0 if batch.audio_is_dummy else len(words)
        embeddings, mask, labels = splice(
            text,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            words[:audios],
            batch.ctc_target_lengths[:audios],
            model.audio_id,
        )
        return teach(
            state.llm, student, embeddings.detach(), mask, labels, counted_rows(batch), batch.row_keys
        )

    def count(self, batch: Batch) -> int:
        return int(((batch.labels[:, 1:] != -100) & counted_rows(batch)[:, None]).sum())


def counted_rows(batch: Batch) -> torch.Tensor:
    """Return [B] bool: every audio of the row has a transcript."""
    rows = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    if not batch.audio_is_dummy:
        if batch.audio_rows is None:
            raise ValueError("the batch does not name the rows of its audios (Batch.audio_rows)")
        rows[batch.audio_rows[~batch.has_transcript]] = False
    return rows


def teach(
    llm: LLM,
    student: torch.Tensor,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    row_keys: torch.Tensor | None,
) -> torch.Tensor:
    """Run the LLM without LoRA, and return the sum of KL over the counted rows' target positions.

    The sum is computed inside the output layer, where ZeRO-3 has gathered its weight.
    """
    arguments, arranged_labels, keys = arrange(embeddings, mask, labels, row_keys, False)
    rows, columns = torch.nonzero(arranged_labels[:, 1:] != -100, as_tuple=True)
    counts = counted[rows]
    if not len(rows):
        rows, columns, counts = rows.new_zeros(1), columns.new_zeros(1), counts.new_zeros(1)
    seen = {}

    def compare(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0][rows, columns]
        with torch.enable_grad():
            kind = torch.promote_types(hidden.dtype, torch.float32)
            seen["loss"] = HeadKL.apply(student, hidden.detach(), module.weight.detach(), counts.to(kind))
        return (hidden[None, :1],)

    handle = base_of(llm).get_output_embeddings().register_forward_pre_hook(compare)
    try:
        without_lora = llm.disable_adapter() if isinstance(llm, PeftModel) else nullcontext()
        with torch.no_grad(), without_lora, token_keys_in_use(llm, keys):
            llm(**arguments, use_cache=False)
    finally:
        handle.remove()
    return seen["loss"]
