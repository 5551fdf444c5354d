"""Look-back attention against the softmax written out for each utterance."""

import torch

from model.ops import lookback_attention


def test_each_utterance_alone():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 5), torch.randn(3, 6, 2, 5), torch.randn(3, 6, 2, 5)
    kept_lengths, key_lengths = torch.tensor([4, 2, 1]), torch.tensor([6, 3, 0])
    key_mask = torch.rand(3, 6) < 0.7
    for mask in (None, key_mask):
        out = lookback_attention(query, key, value, kept_lengths, key_lengths, key_mask=mask)
        for row in range(3):
            keys = [t for t in range(int(key_lengths[row])) if mask is None or mask[row, t]]
            for q in range(4):
                expected = torch.zeros(2, 5)
                if q < kept_lengths[row] and keys:
                    for head in range(2):
                        score = torch.stack([query[row, q, head] @ key[row, t, head] for t in keys]) / 5**0.5
                        expected[head] = score.softmax(0) @ value[row, keys, head]
                torch.testing.assert_close(out[row, q], expected)


def test_gradient_has_no_nan():
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    key = torch.randn(2, 5, 1, 4, requires_grad=True)
    out = lookback_attention(query, key, key, torch.tensor([3, 1]), torch.tensor([5, 0]))
    out.sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all() and (key.grad[1] == 0).all()
