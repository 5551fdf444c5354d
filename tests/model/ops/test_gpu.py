"""The op on a CUDA GPU: Triton against float64 on the CPU, and look-back through FlashAttention against
PyTorch's."""

import pytest
import torch

from model.ops import ctc_runs, dropout, keyed_dropout, linear_ctc, lookback, lookback_attention
from tests.model.ops.truth import Case, ordinary, peaked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def float32_products():
    """No TF32: the comparison is with float64."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def agree(case: Case, dtype: torch.dtype, relative: float, **options) -> None:
    kept = case.inputs(dtype)
    leaves = [None if leaf is None else leaf.detach().cuda().requires_grad_() for leaf in kept]
    hidden, weight, row = leaves
    loss, argmax, lse, *_ = linear_ctc(
        hidden,
        weight,
        case.input_lengths.cuda(),
        case.targets.cuda(),
        case.target_lengths.cuda(),
        case.blank,
        extra_row=row,
        reduction="none",
        **options,
    )
    found = torch.autograd.grad(loss.sum(), [leaf for leaf in leaves if leaf is not None])
    expected, gradients, logits = ordinary(case, *kept)
    real = torch.arange(logits.shape[1])[None] < case.input_lengths[:, None]
    pairs = [
        (loss, expected),
        (lse.cpu()[real], logits.logsumexp(-1)[real]),
        *zip(found, gradients, strict=True),
    ]
    pairs.append((logits.gather(-1, argmax.cpu()[..., None])[..., 0][real], logits.amax(-1)[real]))
    for actual, wanted in pairs:
        assert (actual.detach().cpu().double() - wanted).abs().max() <= relative * (wanted.abs().max() + 1)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 5e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("extra_row", [False, True])
def test_as_ctc_loss(implementation, dtype, relative, extra_row):
    if implementation == "triton":
        pytest.importorskip("triton")
    case = peaked(3, 40, 24, 2100, 7, sharpness=2.0, extra_row=extra_row)
    case.input_lengths, case.target_lengths = torch.tensor([40, 33, 12]), torch.tensor([7, 0, 5])
    agree(case, dtype, relative, implementation=implementation, skip_below=0.0)


def test_several_products_and_default_skipping(monkeypatch):
    triton_backend = pytest.importorskip("model.ops.triton_backend")
    monkeypatch.setattr(triton_backend, "LOGITS_AT_ONCE", 64 * 512 * 4)
    agree(peaked(2, 200, 64, 5000, 30, sharpness=6.0, label_pool=1500), torch.float32, 5e-5)


def test_long_targets():
    pytest.importorskip("triton")
    agree(peaked(1, 900, 16, 700, 400, sharpness=3.0), torch.float32, 1e-4)


def test_runs_stay_on_the_gpu():
    argmax, peak = torch.randint(0, 3, (4, 50)), torch.rand(4, 50)
    lengths = torch.tensor([50, 1, 0, 33])
    on_cpu = ctc_runs(argmax, peak, lengths, 0)
    on_gpu = ctc_runs(argmax.cuda(), peak.cuda(), lengths.cuda(), 0)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_the_masks_of_the_cpu(dtype):
    x, keys = 1 + torch.rand(37, 1030).to(dtype), torch.randint(-(2**63), 2**63 - 1, (37,))
    leaf = x.cuda().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = keyed_dropout(leaf, keys.cuda(), -5, 0.1)
    assert not dropout._has_triton() or [t.numel() for t in saved] == [37], "no mask is kept"
    torch.testing.assert_close(out.cpu(), keyed_dropout(x, keys, -5, 0.1), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(gradient == 0, out == 0)


@pytest.mark.skipif(lookback.flash_attn_varlen_func is None, reason="flash-attn is not installed")
def test_lookback_through_flash_attention(monkeypatch):
    query, key, value = (
        torch.randn(3, length, 4, 64, device="cuda", dtype=torch.bfloat16) for length in (9, 40, 40)
    )
    lengths = torch.tensor([9, 4, 1], device="cuda"), torch.tensor([40, 21, 0], device="cuda")
    mask = torch.rand(3, 40, device="cuda") < 0.7
    through_flash = lookback_attention(query, key, value, *lengths, key_mask=mask)
    monkeypatch.setattr(lookback, "flash_attn_varlen_func", None)
    through_torch = lookback_attention(query, key, value, *lengths, key_mask=mask)
    torch.testing.assert_close(through_flash, through_torch, atol=2e-2, rtol=2e-2)
