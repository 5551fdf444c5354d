"""The reference op against torch's own log_softmax + ctc_loss."""

import pytest
import torch
from torch.nn import functional

from model.ops import linear_argmax, linear_ctc

torch.manual_seed(0)


def ordinary(hidden, weight, input_lengths, targets, target_lengths, blank, **options):
    logprob = functional.linear(hidden, weight).float().log_softmax(-1) if hidden.dtype != torch.float64 else functional.linear(
        hidden, weight).log_softmax(-1)
    return functional.ctc_loss(logprob.transpose(0, 1), targets, input_lengths, target_lengths, blank=blank, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_loss_as_ctc_loss(reduction, zero_infinity):
    hidden, weight = torch.randn(4, 9, 6), torch.randn(23, 6)
    targets = torch.tensor([[1, 1, 2, 0], [3, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
    input_lengths, target_lengths = torch.tensor([9, 5, 6, 4]), torch.tensor([4, 1, 4, 0])
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    loss, *_ = linear_ctc(hidden, weight, input_lengths, targets, target_lengths, 22, implementation="reference", **options)
    torch.testing.assert_close(loss, ordinary(hidden, weight, input_lengths, targets, target_lengths, 22, **options))


def test_gradient_in_float64():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    blank_row = torch.randn(3, dtype=torch.float64, requires_grad=True)
    targets, lengths = torch.tensor([[1, 1], [4, 0]]), torch.tensor([2, 1])

    def loss(h, w, row):
        return linear_ctc(h, w, torch.tensor([5, 3]), targets, lengths, 6, extra_row=row, implementation="reference")[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, blank_row))


def test_argmax_and_normaliser():
    hidden, weight = torch.randn(3, 7, 5), torch.randn(11, 5)
    argmax, lse, largest, blank_logit = linear_argmax(hidden, weight, torch.tensor([7, 0, 3]), blank=2)
    logits = hidden @ weight.T
    torch.testing.assert_close(lse[0], logits[0].logsumexp(-1))
    assert (argmax[0] == logits[0].argmax(-1)).all() and (argmax[1] == 2).all() and (lse[2, 3:] == 0).all()
    torch.testing.assert_close(largest[2, :3], logits[2, :3].amax(-1))
    torch.testing.assert_close(blank_logit[0], logits[0, :, 2])


@pytest.mark.parametrize("target, words", [(22, "utterance 1: target 22 at position 0 is the blank"),
                                           (23, "utterance 1: target 23 at position 0 lies outside")])
def test_wrong_target_names_the_utterance(target, words):
    with pytest.raises(ValueError, match=words):
        linear_ctc(torch.randn(2, 4, 3), torch.randn(23, 3), torch.tensor([4, 4]), torch.tensor([[1], [target]]),
                   torch.tensor([1, 1]), 22)
