"""Dropout of the network: one conversation has the same masks in any batch, and another step, pass or place
has others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from core.keys import signed_key64
from model import language_model
from model.alignment import TransformerLayer
from model.compressors.ctc_peaks import CTCPeaks
from model.config import ShrinkingConfig, SoundwaveConfig
from model.dropout import (
    KeyedDropout,
    LoraDropout,
    TokenKeys,
    dropped_frames,
    key_lora_dropout,
    position_keys,
)
from model.pretrained import SourceError
from model.rows import probe
from model.soundwave import Soundwave
from tests.model import families, tiny
from tests.model.tiny import chat

SECONDS, TEXTS = [0.9, 0.3, 1.2], ["the wall", "a", "all the walls"]
CHATS = [
    chat("What?", "the wall"),
    chat("Say it, please.", "a"),
    chat("Hm", "all the walls"),
    chat("Two and two?", "Four, of course.", audio=False),
]
LOSSES = ("ce", "ctc")


def built(
    folders,
    *,
    lora_dropout: float = 0.2,
    checkpointed: bool = False,
    lookback: str = "all",
    attention: str = "time",
) -> Soundwave:
    """In training mode, all dropout on, look-back and LoRA that do something, rows joined where that is
    cheaper."""
    config = tiny.config(folders("whisper"), folders("llama_tied"), dropout=0.2, attention=attention)
    config.llm.lora_dropout, config.shrinking.dropout, config.shrinking.lookback = lora_dropout, 0.2, lookback
    torch.manual_seed(1)
    model = Soundwave.build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("shrinking.out"):
                parameter.normal_(0, 0.1)
    if checkpointed:
        model.enable_activation_checkpointing()
    model.train()
    model.llm.joins_rows = probe(model.llm, model.audio_id).kept_apart
    assert model.llm.joins_rows
    return model


def part_of(batch, rows: list[int]):
    """Some conversations of a batch, the first three of which have one audio each, in another order."""
    audios = [row for row in rows if row < 3] or [0]
    return replace(
        batch,
        waveforms=batch.waveforms[audios],
        audio_lengths=batch.audio_lengths[audios],
        audio_is_dummy=all(row >= 3 for row in rows),
        ctc_targets=batch.ctc_targets[audios],
        ctc_target_lengths=batch.ctc_target_lengths[audios],
        has_transcript=batch.has_transcript[audios] & torch.tensor([row in rows for row in audios]),
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        labels=batch.labels[rows],
        audio_keys=batch.audio_keys[audios],
        row_keys=batch.row_keys[rows],
    )


def whole(model):
    batch = tiny.batch(model, CHATS, SECONDS, TEXTS)
    keys = torch.tensor([signed_key64("utterance", 0, row, 0) for row in range(4)])
    return replace(batch, audio_keys=keys[:3], row_keys=keys)


def result(model, batches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients, summed over batches of one step."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        output = model(batch.at_step(signed_key64("step", 0, 7)), losses=LOSSES)
        (output.ce_sum + output.ctc_sum).backward()
        total += (output.ce_sum + output.ctc_sum).detach()
    return total, {name: p.grad.clone() for group in model.parameter_groups().values() for name, p in group}


@pytest.mark.parametrize(
    "options", [{}, {"checkpointed": True}, {"lookback": "kept"}, {"attention": "frame"}], ids=str
)
@pytest.mark.parametrize(
    "cut", [[[0], [1], [2], [3]], [[3, 1], [2, 0]], [[2, 1, 0, 3]]], ids=["alone", "pairs", "reversed"]
)
def test_a_step_is_the_same_however_it_is_cut(folders, cut, options):
    model = built(folders, **options)
    batch = whole(model)
    expected, wanted = result(model, [batch])
    model.llm.joins_rows = cut[0] != [3, 1]  # and joined or padded
    loss, gradients = result(model, [part_of(batch, rows) for rows in cut])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name in wanted:
        torch.testing.assert_close(
            gradients[name], wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max()) + 1e-6
        )


def test_masks_matter_and_checkpointing_has_those_of_the_forward(folders):
    plain, checkpointed = built(folders), built(folders, checkpointed=True)
    batch = whole(plain)
    loss, gradients = result(plain, [batch])
    again, same = result(checkpointed, [batch])
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], same[name]) for name in gradients)
    without = result(plain.eval(), [batch])[0]
    assert abs(loss - without) > 1e-3 * without


def test_two_forwards_before_a_backward_keep_their_own_masks(folders):
    """Activation checkpointing computes layers again when another batch has been through the LLM."""
    model = built(folders, checkpointed=True)
    one, two = whole(model), part_of(whole(model), [1, 0])
    expected = result(model, [one])[1]
    model.zero_grad()
    output = model(one.at_step(signed_key64("step", 0, 7)), losses=LOSSES)
    model(two.at_step(1), losses=LOSSES)
    (output.ce_sum + output.ctc_sum).backward()
    for name, parameter in [pair for group in model.parameter_groups().values() for pair in group]:
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("only", ["alignment", "shrinking", "lora"])
def test_each_part_draws_anew_in_each_step_and_pass_and_for_each_utterance(folders, only):
    model = built(folders)
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            part = "lora" if isinstance(module, LoraDropout) else module.name.split(".")[0]
            module.p = 0.3 if part == only else 0.0
    batch = whole(model)

    def loss(step: int, epoch: int = 0) -> float:
        keys = torch.tensor([signed_key64("utterance", 0, row, epoch) for row in range(4)])
        return float(
            model(
                replace(batch, audio_keys=keys[:3], row_keys=keys).at_step(step), losses=LOSSES
            ).ce_sum.detach()
        )

    assert loss(1) == loss(1) and len({loss(1), loss(2), loss(1, epoch=1)}) == 3


def test_every_place_has_its_own_site(folders):
    model = built(folders)
    found = [module.site for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(set(found)) == len(found) == 4 + 1 + 2 * 4, (
        "one layer's four, the look-back's, q, k, v and o of two LLM layers"
    )
    assert not [
        name
        for name, module in model.llm.named_modules()
        if isinstance(module, nn.Dropout) and "lora" in name
    ]


def test_text_alone_has_masks_of_its_own_keys(folders):
    model = built(folders)
    batch = part_of(whole(model), [3])
    other = replace(batch, row_keys=batch.row_keys + 1)
    assert model(batch, losses=("ce",)).ce_sum != model(other, losses=("ce",)).ce_sum
    assert (
        model(batch, losses=("ce",)).ce_sum
        == model(replace(batch, audio_keys=batch.audio_keys + 1), losses=("ce",)).ce_sum
    )


def test_training_without_keys_is_refused(folders):
    model = built(folders)
    batch = replace(whole(model), audio_keys=None, row_keys=None)
    with pytest.raises(
        ValueError, match="dropout of alignment.layers.0.* needs its utterances' keys in training"
    ):
        model(batch, losses=LOSSES)
    model.eval()
    assert model(batch, losses=LOSSES).ce_sum > 0


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(
        ValueError, match=f"dropout of alignment.layers.0.frames is {rate}: give a number from 0 to below 1"
    ):
        TransformerLayer(8, 2, 16, rate, "time", "alignment.layers.0")


# ---- attention


@pytest.mark.parametrize("attention", ["time", "frame"])
def test_layer_equals_stock_pytorch_with_the_masks_put_in(attention):
    """`nn.TransformerEncoderLayer` written out, its four masks being those of the keys."""
    torch.manual_seed(0)
    layer, heads = TransformerLayer(12, 3, 24, 0.3, attention, "x").train(), 3
    x, keys = torch.randn(2, 7, 12), position_keys(torch.tensor([5, 6]), 7)
    valid = torch.ones(2, 7, dtype=torch.bool)

    def mask(place: str, width: int) -> torch.Tensor:
        return getattr(layer, f"drop_{place}")(torch.ones(2, 7, width), keys)

    query, key, value = layer.qkv(layer.norm1(x)).view(2, 7, 3, heads, 4).permute(2, 0, 3, 1, 4)
    weights = (
        (query @ key.transpose(-1, -2) / 4**0.5).softmax(-1)
        if attention == "time"
        else torch.eye(7).expand(2, 3, 7, 7)
    )
    weights = weights * mask("frames", heads).transpose(1, 2)[:, :, None]  # [A, H, queries, frames]
    mixed = layer.out((weights @ value).transpose(1, 2).flatten(2))
    expected = x + mixed * mask("mixed", 12)
    inner = F.relu(layer.up(layer.norm2(expected))) * mask("inner", 24)
    expected = expected + layer.down(inner) * mask("out", 12)
    torch.testing.assert_close(layer(x, valid, keys), expected, rtol=1e-5, atol=1e-5)


def test_a_query_sees_what_dropped_attention_weights_give():
    """Over many draws, one query's mean and variance are those of dropout on its attention weights (the
    definition)."""
    torch.manual_seed(0)
    weights, value, draws, p = torch.rand(6).softmax(0), torch.randn(6, 1, 4), 20_000, 0.25
    dropout = KeyedDropout(p, "here").train()
    keys = position_keys(torch.arange(draws), 6)
    found = torch.einsum("t,athd->ad", weights, dropped_frames(dropout, value.expand(draws, 6, 1, 4), keys))
    exact = torch.einsum("t,thd->d", weights, value)
    variance = p / (1 - p) * (weights[:, None] * value[:, 0]).square().sum(0)
    torch.testing.assert_close(
        found.mean(0), exact, rtol=0, atol=float(5 * variance.max().sqrt() / draws**0.5)
    )
    torch.testing.assert_close(found.var(0), variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("lookback", ["all", "kept"])
def test_lookback_drops_frames_by_their_place_in_the_utterance(lookback):
    """Not by their place among the kept: another number of CTC peaks changes no other frame's mask."""
    torch.manual_seed(0)
    adapter = CTCPeaks(
        SoundwaveConfig(shrinking=ShrinkingConfig(lookback=lookback, dropout=0.4)), 8, 2, 1.0
    ).train()
    nn.init.normal_(adapter.out.weight)
    hidden, kept = torch.randn(1, 9, 8), torch.tensor([[1, 4, 8]])
    seen = []
    adapter.drop_frames.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for frames in (kept, torch.tensor([[4, 8, 0]])):
        adapter.compress(hidden, torch.tensor([9]), frames, torch.tensor([3]), torch.tensor([77]))
    if lookback == "kept":
        assert torch.equal(seen[0][0, 1:], seen[1][0, :2])
    else:
        assert torch.equal(seen[0], seen[1]) and seen[0].shape == (1, 9, 2)


# ---- the LLM


def test_lora_on_what_is_no_token_is_one_line():
    tokens = TokenKeys()
    dropout = LoraDropout(0.1, "llm.x.experts.3", tokens).train()
    with tokens.use(torch.zeros(2, 5, dtype=torch.long)):
        assert dropout(torch.ones(10, 4)).shape == (10, 4), "tokens in one dimension"
        with pytest.raises(
            SourceError, match=r"the input of llm.x.experts.3 is \(7, 4\) where the tokens are \(2, 5\)"
        ):
            dropout(torch.ones(7, 4))
    assert tokens.keys is None


class ToSome(nn.Module):
    """A layer that gets some of the tokens, as a routed expert does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_copy(1, torch.arange(2), self.layer(x[:, :2]))


def test_lora_with_dropout_on_what_is_no_token_is_found_at_the_start():
    for rate in (0.0, 0.1):
        llm = families.llm("llama")
        llm.model.layers[0].mlp = ToSome(llm.model.layers[0].mlp)
        llm = get_peft_model(llm, LoraConfig(r=2, lora_dropout=rate, target_modules=["down_proj"]))
        key_lora_dropout(llm)
        for module in llm.modules():
            module.training = isinstance(module, LoraDropout)
        if not rate:
            probe(llm, 0)
            continue
        with pytest.raises(
            SourceError, match="model.llm.lora_dropout: the input of llm.*down_proj.* is .*lora_targets"
        ):
            probe(llm, 0)


# Families with dropout or jitter in their configs' defaults, and Gemma 3n, which clamps weights while
# training.
NOISY = {
    "opt": dict(dropout=0.1, layerdrop=0.3),
    "xglm": dict(dropout=0.1),
    "biogpt": {},
    "gpt2": {},
    "seed_oss": {},
    "falcon": dict(hidden_dropout=0.1),
    "phimoe": dict(router_jitter_noise=0.3, input_jitter_noise=0.3),
    "gemma3n_text": {},
    "mixtral": dict(router_jitter_noise=0.3),
}


def test_rates_of_dropout_and_jitter_are_taken_out_of_a_copy():
    config = families.config("phimoe", router_jitter_noise=0.3, attention_dropout=0.2)
    quiet = language_model.without_noise(config)
    assert (quiet.router_jitter_noise, quiet.attention_dropout, quiet.hidden_size) == (
        0.0,
        0.0,
        config.hidden_size,
    )
    assert (config.router_jitter_noise, config.attention_dropout) == (0.3, 0.2), (
        "by which a base is recognised"
    )
    opt = language_model.without_noise(families.config("opt", layerdrop=0.3))
    assert not any(value for name, value in vars(opt).items() if "drop" in name)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", NOISY)
def test_a_frozen_llm_draws_nothing_and_changes_nothing_in_training(
    folders, monkeypatch, family, checkpointed
):
    model = built(folders)
    config = families.config(family, **NOISY[family])
    monkeypatch.setattr(families, "config", lambda *_, **__: config)
    llm = families.llm(family)
    key_lora_dropout(llm)
    model.llm = llm
    if checkpointed:
        model.enable_activation_checkpointing()
    model.train()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    embeddings = torch.randn(2, 11, llm.get_input_embeddings().weight.shape[1], requires_grad=True)
    labels, mask = torch.randint(3, 100, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    torch.manual_seed(0)
    state, results = torch.get_rng_state(), []
    for _ in range(2):
        loss = language_model.target_loss(llm, embeddings, mask, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, embeddings)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in llm.state_dict().items())


def test_activation_checkpointing_that_an_llm_lacks_is_one_line(folders):
    model = built(folders)
    model.llm = families.llm("jetmoe")
    key_lora_dropout(model.llm)
    with pytest.raises(
        SourceError, match="optim.activation_checkpointing does not work with .*: set it to false"
    ):
        model.enable_activation_checkpointing()
