"""The whole network on a CUDA GPU against itself on the CPU, in float32 without TF32."""

from __future__ import annotations

import copy

import pytest
import torch

from model.generation.joint import JointSearch
from tests.model import tiny
from tests.model.tiny import chat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture
def both(model, monkeypatch):
    """The same weights on the CPU and on the GPU."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return model, copy.deepcopy(model).cuda()


def test_losses_and_gradients(both):
    found = []
    for model in both:
        batch = tiny.batch(
            model,
            [chat("What?", "the wall"), chat("Say it.", "a"), chat("2 + 2?", "four", audio=False)],
            [0.9, 0.4],
            ["the wall", "a"],
        ).to(next(model.parameters()).device)
        output = model(batch, losses=("ce", "ctc"))
        (output.ce_sum + 0.3 * output.ctc_sum).backward()
        found.append(
            (output, {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad})
        )
    (wanted, gradients), (output, on_gpu) = found
    assert (int(output.frames), int(output.kept), int(output.llm_tokens)) == (
        int(wanted.frames),
        int(wanted.kept),
        int(wanted.llm_tokens),
    )
    torch.testing.assert_close(output.ce_sum.cpu(), wanted.ce_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.ctc_sum.cpu(), wanted.ctc_sum, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            on_gpu[name], gradient, rtol=5e-3, atol=5e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("joint", [None, JointSearch()])
def test_answers(both, joint):
    chats, sounds = (
        [chat("What?"), chat("Say it again, all of it.")],
        [0.1 * torch.randn(14_400), 0.1 * torch.randn(6_400)],
    )
    wanted, found = (m.generate(m.prompts(chats, sounds), max_new_tokens=12, joint=joint) for m in both)
    assert found == wanted and any(wanted)


def test_transcripts_by_the_ctc_head(both):
    chats, sounds = [chat("What?"), chat("Say it.")], [0.1 * torch.randn(14_400), 0.1 * torch.randn(6_400)]
    wanted, found = (m.ctc_greedy(m.prompts(chats, sounds)) for m in both)
    assert found == wanted and any(wanted)
