"""Compressors against independent implementations."""

import numpy as np
import pytest
import torch

from model.compressors import CIF, COMPRESSORS, AllFrames, CTCView, Stacked, compressor_of
from model.compressors.cif import integrate_and_fire
from model.config import OptionError, ShrinkingConfig, SoundwaveConfig

WIDTH = 6


def fire_in_a_loop(hidden: list, alpha: list, count: int) -> list[torch.Tensor]:
    """Dong and Xu 2020, section 3: one frame after the other, threshold 1, of one clip."""
    units, weight, unit = [], torch.zeros((), dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    for frame, part in zip(hidden, alpha, strict=True):
        while weight + part >= 1:  # fires: a part of this frame completes the unit
            used = 1 - weight
            units.append(unit + used * frame)
            part = part - used
            weight, unit = torch.zeros_like(weight), torch.zeros_like(unit)
        weight, unit = weight + part, unit + part * frame
    return [*units, unit][:count]


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 11, WIDTH, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([11, 7, 4])
    alpha = torch.rand(3, 11, generator=generator, dtype=torch.float64) * torch.tensor([[0.7], [0.3], [2.6]])
    alpha = alpha.masked_fill(torch.arange(11) >= lengths[:, None], 0.0)
    return hidden, lengths, alpha


def test_integrate_and_fire_and_its_gradient_equal_a_loop(clips):
    """Also where a frame fires several times (weights above 1), and with a last unit that is not full."""
    hidden, lengths, alpha = clips
    counts = (alpha.sum(1) + 0.5).floor().long().clamp(min=1)
    results = []
    for fire in ("vectorised", "loop"):
        leaves = [t.clone().requires_grad_() for t in (hidden, alpha)]
        if fire == "vectorised":
            inside = torch.arange(11) < lengths[:, None]
            units, _ = integrate_and_fire(leaves[0], leaves[1] * inside, counts)
            units = [units[i, :count] for i, count in enumerate(counts.tolist())]
        else:
            units = [
                torch.stack(fire_in_a_loop(list(h[:n]), list(a[:n]), count))
                for h, a, n, count in zip(*leaves, lengths.tolist(), counts.tolist(), strict=True)
            ]
        weights = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
        loss = sum((unit * weights).tanh().sum() * (i + 1) for i, unit in enumerate(units))
        results.append((units, torch.autograd.grad(loss, leaves)))
    (ours, gradients), (wanted, expected) = results
    assert max(counts) > 3 and bool((alpha > 1).any())
    for one, two in zip([*ours, *gradients], [*wanted, *expected], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_cif_makes_as_many_units_as_target_tokens_in_training():
    torch.manual_seed(0)
    cif = CIF(SoundwaveConfig(), WIDTH, 2, 0.3).double()
    hidden, lengths = torch.randn(3, 20, WIDTH, dtype=torch.float64), torch.tensor([20, 13, 9])
    targets = torch.tensor([5, 0, 2])  # the second clip has no transcript
    view = CTCView(*torch.zeros(3, 3, 20), 0, targets)
    frames, counts, losses, positions = cif.train()(hidden, lengths, ctc=view)
    total = cif.alpha(hidden, lengths).sum(1)
    assert counts.tolist() == [5, max(int(total[1] + 0.5), 1), 2]
    assert frames.shape == (3, 5, WIDTH) and not frames[2, 2:].any()
    torch.testing.assert_close(losses["quantity"], (total - targets).abs() * (targets > 0))
    assert positions[0, :5].tolist() == sorted(positions[0, :5].tolist()) and positions[2].max() < 9
    # Padding does not affect the result, and at inference the number comes from the weights.
    alone, alone_counts, _, _ = cif.eval()(hidden[2:, :9], lengths[2:], ctc=view)
    together, counts, _, _ = cif(hidden, lengths, ctc=view)
    assert counts.tolist() == (total + 0.5).long().clamp(min=1).tolist() and alone_counts[0] == counts[2]
    torch.testing.assert_close(together[2, : counts[2]], alone[0])


def test_quantity_loss_teaches_the_number_of_tokens():
    torch.manual_seed(0)
    cif = CIF(SoundwaveConfig(), WIDTH, 2, 0.3).train()
    hidden, lengths, targets = torch.randn(2, 30, WIDTH), torch.tensor([30, 18]), torch.tensor([12, 7])
    view, optimizer = CTCView(*torch.zeros(3, 2, 30), 0, targets), torch.optim.Adam(cif.parameters(), 0.02)
    for _ in range(150):
        loss = cif(hidden, lengths, ctc=view)[2]["quantity"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1 and cif.eval()(hidden, lengths, ctc=view)[1].tolist() == [12, 7]


def test_stacked_joins_neighbouring_frames():
    stacked = Stacked(SoundwaveConfig(compressor="stacked", compressor_options={"stack": 4}), WIDTH, 2, 0.5)
    hidden, lengths = torch.randn(2, 10, WIDTH), torch.tensor([10, 5])
    hidden[1, 5:] = 0.0
    frames, counts, losses, positions = stacked(hidden, lengths, ctc=CTCView(*torch.zeros(3, 2, 10), 0))
    assert counts.tolist() == [3, 2] and losses == {} and positions[0].tolist() == [0, 4, 8]
    last = torch.cat([hidden[1, 4], torch.zeros(3 * WIDTH)])
    expected = torch.nn.functional.layer_norm(stacked.projection(last), (WIDTH,)) * 0.5
    torch.testing.assert_close(frames[1, 1], expected)
    assert not frames[1, 2:].any()


def test_expected_lengths():
    tokens, seconds = np.array([12.0, 0.0]), np.array([4.0, 2.0])
    has_text = np.array([True, False])
    expected = {"ctc_peaks": [12, 6], "cif": [12, 6], "all_frames": [100, 50], "stacked": [20, 10]}
    for name, lengths in expected.items():
        config = SoundwaveConfig(compressor=name)
        found = compressor_of(config).expected_length(config, tokens, seconds, has_text)
        assert found.tolist() == lengths, name


def test_a_configuration_from_before_compressors_means_the_same():
    assert compressor_of(SoundwaveConfig()) is COMPRESSORS["ctc_peaks"]
    assert compressor_of(SoundwaveConfig(shrinking=ShrinkingConfig(enabled=False))) is AllFrames
    names = AllFrames(SoundwaveConfig(), WIDTH, 2, 1.0).state_dict().keys()
    assert names == {"norm.weight", "norm.bias"}, "tensor names of model folders"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"compressor": "ctc_peak"},
            "model.compressor: compressor 'ctc_peak' is not known; did you mean 'ctc_peaks'",
        ),
        (
            {"compressor_options": {"stack": 2}},
            "model.compressor_options.stack: no option of compressor 'ctc_peaks'",
        ),
        ({"compressor": "stacked", "compressor_options": {"stack": 0}}, "stack is 0: give a number above 0"),
    ],
)
def test_wrong_options_are_one_line(change, message):
    with pytest.raises(OptionError) as error:
        compressor_of(SoundwaveConfig(**change))
    assert message in str(error.value) and "\n" not in str(error.value)
