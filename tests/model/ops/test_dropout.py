"""Keyed dropout against the hash written out with Python's integers, and as a source of random masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.ops import keyed_dropout, mix64
from model.ops.dropout import STEPS

ALL = 2**64 - 1


def splitmix64(state: int) -> int:
    """The next output, as in Vigna's public-domain splitmix64.c."""
    z = (state + 0x9E3779B97F4A7C15) & ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def dropped_by_hand(key: int, site: int, width: int, p: float) -> list[bool]:
    row = splitmix64((key ^ site) & ALL)
    found = []
    for channel in range(width):
        bits = splitmix64(row ^ splitmix64(channel // 4 + 1)) >> (16 * (channel % 4))
        found.append((bits & 0xFFFF) ^ 0x8000 < round(p * STEPS))
    return found


def keys_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, shape))


def test_mix_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "the first output of the published generator from seed 0"
    values = [0, 1, -1, 2**63 - 1, -(2**63), 12345]
    assert [int(v) & ALL for v in mix64(torch.tensor(values))] == [splitmix64(v & ALL) for v in values]


@pytest.mark.parametrize("width", [1, 4, 7, 50])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_is_that_of_the_definition(width, p):
    x = 1 + torch.rand(3, 5, width)
    keys = keys_of(3, 5)
    for site in (0, -7, 2**63 - 1, -(2**63)):
        out = keyed_dropout(x, keys, site, p)
        expected = torch.tensor([[dropped_by_hand(int(k), site, width, p) for k in row] for row in keys])
        assert torch.equal(out == 0, expected)
        torch.testing.assert_close(
            out[~expected], x[~expected] / (1 - round(p * STEPS) / STEPS), rtol=1e-6, atol=0
        )


def test_gradient_is_the_mask():
    x, keys = torch.randn(4, 33, dtype=torch.float64, requires_grad=True), keys_of(4)
    out = keyed_dropout(x, keys, 5, 0.3)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, (out / x).detach())
    assert torch.autograd.gradcheck(lambda x: keyed_dropout(x, keys, 5, 0.3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_has_the_same_mask(dtype):
    keys = keys_of(9)
    x = torch.ones(9, 40)
    out = keyed_dropout(x.to(dtype), keys, 1, 0.2)
    assert out.dtype == dtype and torch.equal(out == 0, keyed_dropout(x, keys, 1, 0.2) == 0)


def test_strides_do_not_matter():
    x, keys = torch.randn(6, 5, 8).transpose(0, 1), keys_of(5, 6)
    assert torch.equal(keyed_dropout(x, keys, 3, 0.4), keyed_dropout(x.contiguous(), keys, 3, 0.4))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_masks_are_independent_over_channels_keys_and_sites(p):
    """Means, and all pairwise correlations by their mean square, as of independent draws; keys differ by one,
    or anyhow."""
    rows, width, sites = 2000, 64, keys_of(2, seed=1).tolist()
    for keys in (torch.arange(rows), keys_of(rows)):
        masks = torch.stack(
            [keyed_dropout(torch.ones(rows, width), keys, site, p) == 0 for site in sites]
        ).double()
        deviation = (p * (1 - p)) ** 0.5
        assert abs(masks.mean() - p) < 5 * deviation / masks.numel() ** 0.5
        centred = masks - p
        for pairs, number in (
            (torch.einsum("src,srd->cd", centred, centred), 2 * rows),  # channels
            (torch.einsum("src,stc->rt", centred, centred), 2 * width),
        ):  # keys
            correlations = (pairs - torch.diag(torch.diag(pairs))) / (number**0.5 * deviation**2)
            assert correlations.square().mean() * len(pairs) / (len(pairs) - 1) == pytest.approx(1, abs=0.15)
        assert abs((centred[0] * centred[1]).mean()) < 5 * deviation**2 / (rows * width) ** 0.5


def test_rates_at_the_ends_and_nothing():
    x, keys = torch.randn(3, 4), keys_of(3)
    assert keyed_dropout(x, keys, 0, 0.0) is x and not keyed_dropout(x, keys, 0, 1.0).any()
    assert keyed_dropout(x[:0], keys[:0], 0, 0.5).shape == (0, 4)


def test_keys_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"keys \(4,\) must have the shape of x \(3, 4\) without its last"):
        keyed_dropout(torch.ones(3, 4), keys_of(4), 0, 0.5)
