"""Alignment adapter, CTC head and shrinking adapter against stock PyTorch layers, one utterance at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.alignment import AlignmentAdapter, CTCHead
from model.compressors import CTCView, compressor_of
from model.compressors.ctc_peaks import CTCPeaks, kept_frames
from model.config import AlignmentConfig, OpsConfig, OptionError, ShrinkingConfig, SoundwaveConfig
from model.soundwave import Soundwave

WIDTH, HEADS, ENCODER = 24, 4, 10


def alignment(**options) -> AlignmentAdapter:
    torch.manual_seed(0)
    return AlignmentAdapter(AlignmentConfig(**options), ENCODER, WIDTH, HEADS).eval()


def stock_layer(ours) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.1, norm_first=True, batch_first=True).eval()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": ours.qkv.weight,
            "self_attn.in_proj_bias": ours.qkv.bias,
            **{
                f"{theirs}.{kind}": getattr(getattr(ours, mine), kind)
                for theirs, mine in (
                    ("self_attn.out_proj", "out"),
                    ("linear1", "up"),
                    ("linear2", "down"),
                    ("norm1", "norm1"),
                    ("norm2", "norm2"),
                )
                for kind in ("weight", "bias")
            },
        }
    )
    return layer


@pytest.mark.parametrize("attention", ["time", "frame"])
@pytest.mark.parametrize("stack, layers", [(2, 1), (3, 2), (1, 1)])
@torch.no_grad()
def test_alignment_adapter_equals_stock_layers(attention, stack, layers):
    adapter = alignment(attention=attention, stack_frames=stack, layers=layers)
    features, lengths = torch.randn(3, 11, ENCODER), torch.tensor([11, 6, 1])
    hidden, short = adapter(features, lengths)
    assert short.tolist() == [-(-n // stack) for n in lengths.tolist()]
    for row, length in enumerate(lengths.tolist()):
        x = F.pad(features[row, :length], (0, 0, 0, -length % stack)).reshape(-1, stack * ENCODER)
        x = adapter.projection(x)[None]
        for ours in adapter.layers:
            x = (
                stock_layer(ours)(x)
                if attention == "time"
                else stock_layer(ours)(x.transpose(0, 1)).transpose(0, 1)
            )
        torch.testing.assert_close(hidden[row, : short[row]], adapter.norm(x)[0], rtol=0, atol=1e-5)
        assert (hidden[row, short[row] :] == 0).all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 5), st.floats(-9, 9))
@torch.no_grad()
def test_adapters_know_neither_companions_nor_padding(lengths, extra, garbage):
    adapter, shrinking = (
        alignment(),
        CTCPeaks(SoundwaveConfig(shrinking=ShrinkingConfig()), WIDTH, HEADS, 0.1).eval(),
    )
    nn.init.normal_(shrinking.out.weight)
    head = CTCHead("tied", torch.randn(7, WIDTH), torch.randn(WIDTH), 7, OpsConfig())
    clips = [torch.randn(n, ENCODER) for n in lengths]
    features = torch.full((len(clips), max(lengths) + extra, ENCODER), garbage)
    for row, clip in enumerate(clips):
        features[row, : len(clip)] = clip

    def run(features, lengths):
        hidden, short = adapter(features, lengths)
        targets = torch.ones(len(lengths), 1, dtype=torch.long)
        loss, argmax, peak, blank = head(hidden, short, targets, torch.ones(len(lengths), dtype=torch.long))
        kept, kept_lengths = kept_frames(ShrinkingConfig(), argmax, peak, blank, short, 7)
        return loss, short, kept_lengths, kept, shrinking.compress(hidden, short, kept, kept_lengths)

    loss, short, kept_lengths, kept, shrunk = run(features, torch.tensor(lengths))
    for row, clip in enumerate(clips):
        one_loss, one_short, one_kept_lengths, one_kept, one = run(clip[None], torch.tensor([len(clip)]))
        torch.testing.assert_close(loss[row], one_loss[0], rtol=1e-5, atol=1e-5)
        count = int(one_kept_lengths)
        assert short[row] == one_short[0] and int(kept_lengths[row]) == count >= 1
        assert torch.equal(kept[row, :count], one_kept[0, :count])
        torch.testing.assert_close(shrunk[row, :count], one[0, :count], rtol=0, atol=1e-5)
        assert (shrunk[row, count:] == 0).all()


def test_tied_head_trains_the_blank_row_alone_and_equals_full_logits():
    table = torch.randn(9, WIDTH)
    head = CTCHead("tied", table.clone(), 0.1, 5, OpsConfig())
    assert head.blank == 9 and 0.02 < head.blank_row.std() < 0.3
    hidden = torch.randn(2, 8, WIDTH, requires_grad=True)
    lengths, targets, target_lengths = (
        torch.tensor([8, 5]),
        torch.tensor([[1, 2, 2], [3, 0, 0]]),
        torch.tensor([3, 1]),
    )
    loss, argmax, peak, blank = head(hidden, lengths, targets, target_lengths)
    loss.sum().backward()
    ours = hidden.grad.clone(), head.blank_row.grad.clone()
    assert head.weight.grad is None
    row = head.blank_row.detach().clone().requires_grad_()
    hidden.grad = None
    log = (hidden @ torch.cat([table, row[None]]).T).log_softmax(-1)
    expected = (
        F.ctc_loss(log.transpose(0, 1), targets, lengths, target_lengths, blank=9, reduction="none")
        / target_lengths
    )
    expected.sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], row.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(argmax[0], log[0].argmax(-1)) and torch.equal(argmax[1, :5], log[1, :5].argmax(-1))
    torch.testing.assert_close(peak[0], log[0].amax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blank[0], log[0, :, 9], rtol=1e-4, atol=1e-5)


def test_trained_heads_hold_the_blank_where_the_tokenizer_has_it():
    table = torch.randn(9, WIDTH)
    for audio_id, rows in ((9, 10), (6, 9)):  # an added token, and one inside a vocabulary that was padded
        copied = CTCHead("initialised", table, 0.1, audio_id, OpsConfig())
        assert (
            copied.weight.shape == (rows, WIDTH) and copied.blank == audio_id and copied.weight.requires_grad
        )
        assert 0.02 < copied.weight[audio_id].std() < 0.3 and torch.equal(copied.weight[:6], table[:6])
        assert CTCHead("free", table, 0.1, audio_id, OpsConfig()).weight.shape == (rows, WIDTH)
    with pytest.raises(ValueError, match="tied, initialised or free"):
        CTCHead("frozen", table, 0.1, 9, OpsConfig())


@pytest.mark.parametrize("lookback", ["all", "kept", "none"])
@torch.no_grad()
def test_shrinking_adapter_equals_stock_attention(lookback):
    adapter = CTCPeaks(
        SoundwaveConfig(shrinking=ShrinkingConfig(lookback=lookback)), WIDTH, HEADS, 0.3
    ).eval()
    hidden, lengths = torch.randn(2, 9, WIDTH), torch.tensor([9, 6])
    kept, kept_lengths = torch.tensor([[0, 3, 4, 8], [2, 5, 0, 0]]), torch.tensor([4, 2])
    fresh = adapter.compress(hidden, lengths, kept, kept_lengths)
    if lookback != "none":
        nn.init.normal_(adapter.out.weight)
        nn.init.normal_(adapter.out.bias)
    shrunk = adapter.compress(hidden, lengths, kept, kept_lengths)
    for row in range(2):
        frames = hidden[row, kept[row, : kept_lengths[row]]]
        start = 0.3 * F.layer_norm(
            frames, (WIDTH,)
        )  # before training: the frames themselves, on the chosen scale
        torch.testing.assert_close(fresh[row, : len(frames)], start, rtol=0, atol=1e-5)
        if lookback != "none":
            stock = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
            stock.load_state_dict(
                {
                    "in_proj_weight": torch.cat([adapter.query.weight, adapter.key_value.weight]),
                    "in_proj_bias": torch.cat([adapter.query.bias, adapter.key_value.bias]),
                    "out_proj.weight": adapter.out.weight,
                    "out_proj.bias": adapter.out.bias,
                }
            )
            over = hidden[row, : lengths[row]] if lookback == "all" else frames
            frames = frames + stock(frames[None], over[None], over[None])[0][0]
        torch.testing.assert_close(shrunk[row, : len(frames)], adapter.norm(frames), rtol=0, atol=1e-5)


def test_without_shrinking_every_frame_is_kept():
    argmax, lengths = torch.zeros(2, 5, dtype=torch.long), torch.tensor([5, 3])
    view = CTCView(argmax, argmax.float(), argmax.float(), 0)
    config = SoundwaveConfig(shrinking=ShrinkingConfig(enabled=False))
    kept, kept_lengths = compressor_of(config).select(config, lengths, view)
    assert kept.tolist() == [[0, 1, 2, 3, 4]] * 2 and torch.equal(kept_lengths, lengths)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: alignment(heads=5), "model.alignment.heads = 5 does not divide the LLM's width 24"),
        (
            lambda: CTCPeaks(SoundwaveConfig(shrinking=ShrinkingConfig(heads=7)), WIDTH, HEADS, 1.0),
            "model.shrinking.heads = 7",
        ),
    ],
)
def test_wrong_settings_are_one_line(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize(
    "config, message",
    [
        (
            SoundwaveConfig(alignment=AlignmentConfig(attention="frames")),
            "model.alignment.attention is 'frames': give time or frame",
        ),
        (
            SoundwaveConfig(shrinking=ShrinkingConfig(keep="last")),
            "model.shrinking.keep is 'last': give peak or first",
        ),
        (
            SoundwaveConfig(shrinking=ShrinkingConfig(lookback="full")),
            "model.shrinking.lookback is 'full': give all, kept or none",
        ),
        (SoundwaveConfig(prompt="plain"), "model.prompt is 'plain': give chat or release"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_built(config, message):
    with pytest.raises(OptionError, match=message):
        Soundwave.build(config)
