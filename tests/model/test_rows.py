"""Rows of a batch in the LLM: what is joined, and that the loss is that of each row alone, joined or
padded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.distributed import Ranks
from model.config import SoundwaveConfig
from model.language_model import one_row_is_cheaper, target_loss
from model.pretrained import SourceError
from model.rows import Rows, longest_row, probe
from stream.collate import Collator
from stream.reader import Sample
from stream.rejected import BrokenSample
from tests.model import families, tiny
from train import engine as engines

# As measured with transformers 5.23; docs/models.md has the same lists.
JOINED = """apertus arcee codegen cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text gemma3n_text glm4
glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite granitemoe hunyuan_v1_dense llama llama4_text minimax_m2 mistral mixtral
nemotron olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2""".split()
PADDED = """afmoe bamba biogpt bloom falcon falcon_h1 gpt_oss granitemoehybrid jamba lfm2 lfm2_moe mamba mamba2 minimax mpt
nemotron_h olmo_hybrid opt qwen3_next recurrent_gemma rwkv xglm zamba2""".split()
REFUSED = {
    "ctrl": "computes a row otherwise where other rows are beside it in a batch",
    "gemma4_text": "does not run as the LLM, which is given embeddings",
}
FEW = ["llama", "gemma3_text", "mixtral", "gpt_oss", "lfm2", "opt", "falcon"]
ID = families.VOCABULARY - 1  # of the audio token


def batch_of(width: int, lengths: tuple[int, ...] = (23, 9, 2, 14, 1), dtype=torch.float32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    embeddings = (0.5 * torch.randn(rows, longest, width, generator=generator)).to(dtype)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(3, ID, (rows, longest), generator=generator).masked_fill(mask == 0, -100)
    return embeddings.requires_grad_(), mask, labels


def alone(llm: nn.Module, embeddings: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row by itself through the LLM's own logits."""
    total = 0.0
    for row, length in enumerate(mask.sum(1).tolist()):
        logits = llm(inputs_embeds=embeddings[row : row + 1, :length], use_cache=False).logits[0].float()
        total = total + F.cross_entropy(logits[:-1], labels[row, 1:length], reduction="sum")
    return total


def width_of(llm: nn.Module) -> int:
    return llm.get_input_embeddings().weight.shape[1]


@pytest.mark.parametrize(
    "family",
    [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in JOINED + PADDED],
)
def test_loss_is_that_of_each_row_alone(family):
    """Loss and gradient, at a width where joining is chosen once it is allowed."""
    llm = families.llm(family)
    rows = probe(llm, ID)
    assert rows.kept_apart == (family in JOINED), str(rows)
    llm.joins_rows = rows.kept_apart
    embeddings, mask, labels = batch_of(width_of(llm))
    assert one_row_is_cheaper(llm, mask, embeddings.shape[-1]) or family == "llama4_text", (
        "attention in chunks of 16"
    )
    if family == "llama4_text":
        embeddings, mask, labels = batch_of(width_of(llm), (6, 2, 5, 1))
        assert one_row_is_cheaper(llm, mask, embeddings.shape[-1])
    expected = alone(llm, embeddings, mask, labels)
    (wanted,) = torch.autograd.grad(expected, embeddings)
    loss = target_loss(llm, embeddings, mask, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FEW)
def test_joining_by_force_is_wrong_exactly_where_it_is_refused(family):
    llm = families.llm(family)
    llm.joins_rows = True
    embeddings, mask, labels = batch_of(width_of(llm))
    expected = alone(llm, embeddings, mask, labels)
    apart = float((abs(target_loss(llm, embeddings, mask, labels) - expected) / expected).detach())
    assert (apart < 1e-5) == probe(llm, ID).kept_apart, apart


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3_moe", "lfm2", "opt", "falcon", "recurrent_gemma"]
)
def test_type_and_attention_do_not_change_the_decision(family, dtype, attention):
    assert probe(families.llm(family, attention).to(dtype), ID).kept_apart == (family in JOINED)


@pytest.mark.parametrize(
    ("family", "window"),
    [("mistral", 4), ("mistral", 100), ("mistral", None), ("gemma3_text", 4), ("gemma3_text", 100)],
)
def test_windows_shorter_and_longer_than_the_rows(family, window):
    llm = families.llm(family, sliding_window=window)
    llm.joins_rows = probe(llm, ID).kept_apart
    embeddings, mask, labels = batch_of(width_of(llm))
    assert llm.joins_rows
    loss, expected = target_loss(llm, embeddings, mask, labels), alone(llm, embeddings, mask, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_an_llm_that_cannot_be_trained_is_one_line(family):
    with pytest.raises(SourceError, match=REFUSED[family]) as caught:
        probe(families.llm(family), ID)
    assert "\n" not in str(caught.value) and "model.llm.name" in str(caught.value)


class Noisy(nn.Module):
    """A layer that draws in eval mode, too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.inner(x), 0.1, training=True)


def test_an_llm_that_draws_random_numbers_is_refused():
    llm = families.llm("llama")
    llm.model.layers[0].mlp = Noisy(llm.model.layers[0].mlp)
    with pytest.raises(SourceError, match="llama draws random numbers while it is trained"):
        probe(llm, ID)


class CountedPositions(nn.Module):
    """Learned positions, counted from the beginning of the joined row; attention keeps rows apart."""

    def __init__(self, norm: nn.Module, width: int):
        super().__init__()
        self.norm, self.table = norm, nn.Parameter(torch.randn(600, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.table[: x.shape[1]]


def test_positions_that_do_not_begin_again_are_found():
    llm = families.llm("llama")
    llm.model.layers[0].input_layernorm = CountedPositions(llm.model.layers[0].input_layernorm, 32)
    rows = probe(llm, ID)
    assert not rows.kept_apart and rows.others == 0 and "differ from rows alone by" in str(rows)


def test_a_row_is_joined_no_longer_than_the_llm_allows():
    mask = batch_of(32)[1]
    for sizes in (dict(max_position_embeddings=40), dict(attention_chunk_size=40), dict(floor_scale=40)):
        llm = families.llm("llama4_text", **{"attention_chunk_size": 4096, **sizes})
        assert int(mask.sum()) == 49 and not one_row_is_cheaper(llm, mask, 32), sizes
        assert one_row_is_cheaper(llm, mask[1:], 32)


def test_long_rows_joined_beyond_the_positions_would_not_be_the_same():
    """Why the limit above: Llama 4 scales its queries by the place in the row that it is given."""
    llm = families.llm(
        "llama4_text", attention_chunk_size=4096, floor_scale=16, attn_scale=5.0, no_rope_layers=[1, 0]
    )
    llm.joins_rows = True
    embeddings, mask, labels = batch_of(32, (12, 9, 2, 14, 1))
    loss, expected = target_loss(llm, embeddings, mask, labels), alone(llm, embeddings, mask, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    llm.config.floor_scale = 4096  # what the limit reads; the layers have read 16
    assert abs(target_loss(llm, embeddings, mask, labels) - expected) > 1e-3 * expected


@pytest.mark.parametrize(
    ("own", "elsewhere", "joined", "told"),
    [
        (True, True, True, "joined without padding where cheaper"),
        (False, False, False, "each depends on the others"),
        (True, False, False, "padded: on another rank"),
    ],
)
def test_all_ranks_decide_alike(monkeypatch, caplog, own, elsewhere, joined, told):
    monkeypatch.setattr(
        engines, "probe", lambda llm, audio_id: Rows(0.0, 0.0 if own else 1.0, 0.0 if own else 1.0, own)
    )
    monkeypatch.setattr(engines, "all_reduce", lambda values, ranks: [values[0] + elsewhere])
    monkeypatch.setattr(engines.logger, "propagate", True)
    llm = nn.Linear(1, 1)
    model, ranks = SimpleNamespace(llm=llm, audio_id=ID), Ranks(0, 2, 0, 2, "cpu")
    engine = SimpleNamespace(model=model, deepspeed=nn.Linear(1, 1), ranks=ranks)
    with caplog.at_level("INFO"):
        engines.Engine._try_rows(engine)
    assert llm.joins_rows is joined and told in caplog.text


# ---- positions that follow the longest row of a batch


LONGROPE = dict(
    family="phi3",
    original_max_position_embeddings=16,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
)
DYNAMIC = dict(
    family="llama",
    max_position_embeddings=16,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
)


@pytest.mark.parametrize("sizes", [LONGROPE, DYNAMIC], ids=lambda sizes: sizes["family"])
def test_a_row_beyond_the_limit_changes_the_rows_beside_it(sizes):
    """Why such conversations are left out: transformers chooses a batch's frequencies by its longest row."""
    llm = families.llm(**sizes)
    assert longest_row(llm.config) == 16 and longest_row(families.config("llama")) is None
    for lengths, exact in (((16, 9), True), ((17, 9), False)):
        embeddings, mask, labels = batch_of(32, lengths)
        apart = abs(target_loss(llm, embeddings, mask, labels) - alone(llm, embeddings, mask, labels))
        assert (apart < 1e-3) == exact


@pytest.mark.parametrize(("prompt", "fits"), [("Hm", True), ("Hm" * 30, False)])
def test_a_conversation_that_may_pass_the_limit_is_left_out(prompt, fits):
    """20 frames of the adapter may all be kept."""
    words = tiny.tokenizer("chatml", ("<audio_patch>",))
    meta = {"id": "a", "task": "asr", "text": "the wall", "prompt": prompt, "duration": 0.8}
    taken = len(
        Collator(words, SoundwaveConfig(), "shrinking", "lower")
        .prepare(Sample(meta, torch.zeros(800 * 16)))
        .input_ids
    )
    collator = Collator(words, SoundwaveConfig(), "shrinking", "lower", row_limit=100)
    assert (taken + 20 <= 100) == fits
    if fits:
        assert collator.prepare(Sample(meta, torch.zeros(800 * 16)))
        return
    with pytest.raises(
        BrokenSample, match=f"its conversation may take {taken + 20} LLM positions, above 100, beyond which"
    ):
        collator.prepare(Sample(meta, torch.zeros(800 * 16)))


def test_the_documents_name_the_families_that_are_tested():
    lines = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.split("|")]
        for line in lines
        if line.startswith(("| joined", "| padded"))
    ]
    found = {kind: families for _, kind, families, *_ in cells}
    assert found == {"joined": ", ".join(sorted(JOINED)), "padded": ", ".join(sorted(PADDED))}
