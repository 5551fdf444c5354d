"""The LLM's cross-entropy a chunk of positions at a time, against all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import language_model
from model.language_model import HeadCrossEntropy, base_of, one_row_is_cheaper, target_loss
from tests.model import tiny
from tests.model.conftest import build


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "positions, width, vocabulary, chunk", [(1, 5, 7, 10**6), (13, 31, 123, 300), (47, 16, 1009, 1009)]
)
def test_equals_cross_entropy(monkeypatch, positions, width, vocabulary, chunk, dtype, tolerance):
    monkeypatch.setattr(language_model, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    plain = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(0.37 * plain, hidden)
    loss = HeadCrossEntropy.apply(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(0.37 * loss, hidden)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family, product", [("llama", True), ("qwen2", True), ("gemma2", False)])
def test_a_model_that_does_more_than_multiply_keeps_its_end(folders, family, product):
    """Gemma 2 caps its logits behind the head: it is noticed, and every family's loss is that of its own
    logits."""
    llm = build(folders, family).llm
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, 9, 32, generator=generator).requires_grad_()
    mask, labels = torch.ones(3, 9, dtype=torch.long), torch.randint(250, (3, 9), generator=generator)
    labels[:, :4] = -100
    if not product:  # small logits would hide the cap
        base_of(llm).config.final_logit_softcapping = 1.0
    logits = llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    plain = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    (expected,) = torch.autograd.grad(plain, embeddings)
    for _ in range(2):  # the first call finds out, the second one knows
        loss = target_loss(llm, embeddings, mask, labels)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert llm.head_is_a_product is product
    assert float(target_loss(llm, embeddings, mask, torch.full_like(labels, -100))) == 0.0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_rows_joined_without_padding_are_the_rows_alone(folders, family, attention):
    """Also where a label stands on a row's first token, which the row before must not predict."""
    llm = build(folders, family).llm
    if attention == "sdpa" and not base_of(llm)._supports_sdpa:
        pytest.skip("transformers runs this family with eager attention alone")
    base_of(llm).set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 2, 5, 1)
    embeddings = torch.randn(4, 9, 32, generator=generator).requires_grad_()
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(250, (4, 9), generator=generator).masked_fill(mask == 0, -100)
    plain = 0.0
    for row, length in enumerate(lengths):
        logits = llm(inputs_embeds=embeddings[row : row + 1, :length], use_cache=False).logits[0]
        plain = plain + F.cross_entropy(logits[:-1], labels[row, 1:length], reduction="sum")
    (expected,) = torch.autograd.grad(plain, embeddings)
    assert one_row_is_cheaper(llm, mask, 32)
    llm.joins_rows = True
    loss = target_loss(llm, embeddings, mask, labels)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_rows_stay_apart_where_joining_saves_nothing(folders):
    llm = build(folders, "llama").llm
    assert not one_row_is_cheaper(llm, torch.ones(8, 64, dtype=torch.long), 32), (
        "no padding to save, attention to lose"
    )
    assert not one_row_is_cheaper(llm, torch.zeros(2, 3, dtype=torch.long), 32)


def test_nothing_as_large_as_the_logits_is_kept(folders):
    llm = build(folders, "llama").llm
    embeddings = torch.randn(4, 60, 32).requires_grad_()
    mask, labels = torch.ones(4, 60, dtype=torch.long), torch.randint(250, (4, 60))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        target_loss(llm, embeddings, mask, labels)
    assert 0 < max(kept) < 4 * 59 * base_of(llm).config.vocab_size
