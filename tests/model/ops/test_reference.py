"""The reference in float64: its gradient by finite differences. (test_linear_ctc.py has the rest.)"""

import torch

from model.ops import linear_argmax, linear_ctc


def test_gradient_in_float64():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    blank_row = torch.randn(3, dtype=torch.float64, requires_grad=True)
    targets, lengths = torch.tensor([[1, 1], [4, 0]]), torch.tensor([2, 1])

    def loss(h, w, row):
        return linear_ctc(
            h, w, torch.tensor([5, 3]), targets, lengths, 6, extra_row=row, implementation="reference"
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, blank_row))


def test_argmax_and_normaliser():
    hidden, weight = torch.randn(3, 7, 5), torch.randn(11, 5)
    argmax, lse, largest, blank_logit = linear_argmax(hidden, weight, torch.tensor([7, 0, 3]), blank=2)
    logits = hidden @ weight.T
    torch.testing.assert_close(lse[0], logits[0].logsumexp(-1))
    assert (argmax[0] == logits[0].argmax(-1)).all() and (argmax[1] == 2).all() and (lse[2, 3:] == 0).all()
    torch.testing.assert_close(largest[2, :3], logits[2, :3].amax(-1))
    torch.testing.assert_close(blank_logit[0], logits[0, :, 2])
