"""KL distillation against plain PyTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.losses import distillation
from model.losses.base import ForwardState
from model.losses.distillation import Distillation, HeadKL
from tests.model import tiny


@pytest.mark.parametrize("columns", [3, 7, 100])
def test_chunked_kl_and_its_gradient_equal_the_formula(columns, monkeypatch):
    student, teacher, weight = torch.randn(5, 4), torch.randn(5, 4), torch.randn(17, 4)
    student, teacher, weight = (3 * t.double() for t in (student, teacher, weight))
    counts = torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64)
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", columns * len(student))
    results = []
    for kind in ("chunked", "plain"):
        leaf = student.clone().requires_grad_()
        if kind == "chunked":
            loss = HeadKL.apply(leaf, teacher, weight, counts)
        else:
            q, p = ((hidden @ weight.T).log_softmax(1) for hidden in (leaf, teacher))
            loss = (counts * F.kl_div(q, p, reduction="none", log_target=True).sum(1)).sum()
        results.append((loss, *torch.autograd.grad(2 * loss, leaf)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert HeadKL.apply(teacher, teacher, weight, counts).abs() < 1e-12


@pytest.mark.parametrize("after_cross_entropy", [True, False])
def test_teacher_reads_the_transcript_without_lora(model, after_cross_entropy):
    chats = [tiny.chat("write", "the wall"), tiny.chat("say", "a", audio=False), tiny.chat("go", "all the")]
    batch = tiny.batch(model, chats, [0.5, 0.4], ["the wall", None])
    batch = replace(batch, audio_rows=torch.tensor([0, 2]))
    model.set_stage("sft")
    audio = model.encode_audio(batch)
    state = ForwardState(model, batch, audio)
    if after_cross_entropy:
        distillation.target_loss(model.llm, *state.llm_input, batch.row_keys, state.shared)
    term = Distillation()
    loss = term.numerator(state)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    gradients = torch.autograd.grad(loss, lora)

    expected, number = 0.0, 0
    for row in (0, 1):  # the third row's audio has no transcript
        ids, labels = batch.input_ids[row], batch.labels[row]
        words = batch.ctc_targets[0, : batch.ctc_target_lengths[0]]
        text, answers = [], []
        for token, label in zip(
            ids[batch.attention_mask[row].bool()].tolist(), labels.tolist(), strict=False
        ):
            new = words.tolist() if token == model.audio_id else [token]
            text, answers = text + new, answers + [label] * len(new)
        with model.llm.disable_adapter(), torch.no_grad():
            p = model.llm(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        embeddings, mask, spliced = model.embeddings(batch, audio)
        inside = mask[row].bool()
        q = model.llm(inputs_embeds=embeddings[row][inside][None]).logits[0].log_softmax(-1)
        at_p = [i - 1 for i, label in enumerate(answers) if label != -100]
        at_q = [i - 1 for i, label in enumerate(spliced[row][inside].tolist()) if label != -100]
        expected = expected + F.kl_div(q[at_q], p[at_p], reduction="sum", log_target=True)
        number += len(at_q)
    assert term.count(batch) == number and loss > 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, lora), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=1e-6)


def test_a_dummy_batch_adds_zero(model):
    batch = tiny.batch(model, [tiny.chat("say", None, audio=False)], [], [])
    state = ForwardState(model, batch, model.encode_audio(batch))
    assert Distillation().numerator(state) == 0 and Distillation().count(batch) == 0
