"""LoRA's targets: the default by the LLM's structure, names that must match, peft's other ways to say it, the
merge."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model import artifact
from model.artifact import FolderError
from model.config import LLMConfig
from model.export import export
from model.language_model import described_targets, lora_targets, resolved_targets, with_lora
from model.official import LoRAMerge
from model.pretrained import Source, SourceError
from model.soundwave import Soundwave
from tests.model import tiny

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("ffn_dim", "intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}

# By each family's modelling code: what projects into and out of its attention.
ATTENTION = {
    "llama": "q_proj k_proj v_proj o_proj",
    "qwen3": "q_proj k_proj v_proj o_proj",
    "gemma2": "q_proj k_proj v_proj o_proj",
    "phi3": "qkv_proj o_proj",
    "gpt_oss": "q_proj k_proj v_proj o_proj",
    "phi": "q_proj k_proj v_proj dense",
    "gpt_neox": "query_key_value dense",
    "falcon": "query_key_value dense",
    "bloom": "query_key_value dense",
    "mpt": "Wqkv out_proj",
    "opt": "q_proj k_proj v_proj out_proj",
    "gptj": "q_proj k_proj v_proj out_proj",
    "gpt2": "c_attn c_proj",
    "gpt_bigcode": "c_attn c_proj",
    "lfm2": "q_proj k_proj v_proj out_proj",
    "codegen": "qkv_proj out_proj",
}
NOT_ATTENTION = (
    "mlp",
    "feed_forward",
    "ffn",
    "fc1",
    "fc2",
    "c_fc",
    "conv",
    "router",
    "experts",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "lm_head",
)


def meta(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(family)
    for key, value in SMALL.items():
        if hasattr(config, key) and key not in getattr(config, "attribute_map", {}):
            with contextlib.suppress(AttributeError, NotImplementedError):
                setattr(config, key, value)
    if family == "lfm2":
        config.layer_types = ["conv", "full_attention"]
    elif getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return AutoModelForCausalLM._model_mapping[type(config)](config)


def adapted(llm: torch.nn.Module, targets, name: str = "the LLM") -> list[str]:
    """Whole names of the modules that get LoRA."""
    model = with_lora(llm, LLMConfig(lora_r=2, lora_targets=targets), name)
    return [
        key.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for key, _ in model.named_modules()
        if key.endswith(".lora_A.default")
    ]


@pytest.mark.parametrize("family", ATTENTION)
def test_the_default_is_the_attention_of_every_layer(family):
    keys = adapted(meta(family), None)
    assert {key.rpartition(".")[2] for key in keys} == set(ATTENTION[family].split())
    layers = 1 if family == "lfm2" else 2  # one of its two is a convolution
    assert len(keys) == layers * len(ATTENTION[family].split()), keys
    assert not any(word in key.split(".") for key in keys for word in NOT_ATTENTION), keys


def test_of_a_multimodal_llm_the_text_layers_alone():
    config = AutoConfig.for_model(
        "gemma3",
        text_config={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32},
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
        },
    )
    with torch.device("meta"):
        llm = AutoModelForCausalLM._model_mapping[type(config)](config)
    assert sorted(adapted(llm, None)) == sorted(
        f"model.language_model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"
    )


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_without_attention_the_default_refuses_and_lists_the_layers(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        llm = AutoModelForCausalLM._model_mapping[type(config)](config)
    with pytest.raises(
        SourceError, match="has no attention layers .* its linear layers: in_proj, .*out_proj"
    ) as raised:
        adapted(llm, None, "the/name")
    assert "the/name" in str(raised.value) and "\n" not in str(raised.value)


def test_the_default_is_resolved_from_the_configuration_alone():
    """As resume, dry run and finished stages compare it."""
    for family, expected in (
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("gpt2", ["c_attn", "attn.c_proj"]),
    ):
        source = Source(family, meta(family).config, None)
        assert resolved_targets(LLMConfig(), source) == expected
        assert resolved_targets(LLMConfig(lora_targets=["v_proj"]), source) == ["v_proj"]
    assert resolved_targets(LLMConfig(lora_r=0), Source("mamba", None, None)) is None


@pytest.mark.parametrize(
    "targets, words",
    [
        (
            ["q_proj", "kproj"],
            "has no linear layer 'kproj'; did you mean 'k_proj'? Its linear layers: q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj",
        ),
        (["query_key_value"], "has no linear layer 'query_key_value'"),
        (["Q_PROJ"], "has no linear layer 'Q_PROJ'; did you mean"),
        (["proj"], "has no linear layer 'proj'"),
        (["mlp"], "has no linear layer 'mlp'"),  # a block is none
        (["q_proj", "embed_tokens"], "has no linear layer 'embed_tokens'"),
        (["lm_head"], "has no linear layer 'lm_head'"),
        (
            "q_proj",
            "no linear layer of the LLM has a whole name that the regular expression 'q_proj' matches, such "
            "as "
            "'model.layers.0.self_attn.q_proj'; a list of names is written [q_proj]",
        ),
        (r".*\.mlp", "no linear layer of the LLM has a whole name"),
        (r".*\.(q_proj|mlp)", "'model.layers.0.mlp' of the LLM is no linear layer"),
    ],
)
def test_a_target_that_matches_nothing_is_named(targets, words):
    with pytest.raises(SourceError) as raised:
        adapted(meta("llama"), targets)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        "ALL-LINEAR",
        ["all-linear"],
        r".*\.(q|v)_proj",
        r"model\.layers\.1\..*_proj",
        ["q_proj", "down_proj"],
        ["self_attn.o_proj"],
        ["model.layers.0.mlp.up_proj"],
    ],
)
def test_keywords_expressions_and_names_mean_what_they_mean_to_peft(targets):
    for family in ("llama", "gpt_oss", "lfm2") if "all-linear" in str(targets).lower() else ("llama",):
        asked = "all-linear" if targets == ["all-linear"] else targets  # in a list only ours knows it
        theirs = get_peft_model(meta(family), LoraConfig(r=2, target_modules=asked))
        expected = {
            key.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            for key, _ in theirs.named_modules()
            if key.endswith(".lora_A.default")
        }
        assert set(adapted(meta(family), targets)) == expected and expected


def test_what_has_lora_is_described():
    assert described_targets(with_lora(meta("phi3"), LLMConfig(lora_r=2), "p")) in (
        "o_proj x 2, qkv_proj x 2",
        "qkv_proj x 2, o_proj x 2",
    )


def test_merged_weights_compute_what_lora_does_in_gpt2_too(tmp_path):
    """Its layers hold their weights transposed."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32)).eval()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    llm = with_lora(base, LLMConfig(lora_r=2, lora_alpha=8), "gpt2").eval()
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[1, 2, 3]])
    expected = llm(ids).logits
    llm.save_pretrained(tmp_path)
    merge = LoRAMerge(tmp_path)
    merged = GPT2LMHeadModel(llm.config.__class__(**base.config.to_dict())).eval()
    merged.load_state_dict({name: merge(name, tensor) for name, tensor in plain.items()})
    merge.check_all_used()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"lora_rslora": True},
        {"lora_rank_pattern": {"q_proj": 2.0}, "lora_alpha_pattern": {"v_proj": 3.0}},
        {
            "lora_rslora": True,
            "lora_rank_pattern": {"layers.1.self_attn.o_proj": 7.0},
            "lora_alpha_pattern": {".*layers.0.*": 5.0},
        },
    ],
)
def test_variants_are_merged_as_peft_merges_them(tmp_path, options):
    """peft's merge_and_unload is the reference; ranks are those of the tensors."""
    base = small_llama()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    llm = with_lora(base, LLMConfig(lora_r=4, lora_alpha=6, **options), "small")
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    sizes = {name: tensor.shape[0] for name, tensor in llm.state_dict().items() if "lora_A" in name}
    for pattern, rank in options.get("lora_rank_pattern", {}).items():
        assert {size for name, size in sizes.items() if f"{pattern}.lora" in name} == {int(rank)}
    llm.save_pretrained(tmp_path)
    merge = LoRAMerge(tmp_path)
    ours = {name: merge(name, tensor) for name, tensor in plain.items()}
    merge.check_all_used()
    theirs = llm.merge_and_unload().state_dict()
    assert any(not torch.equal(ours[name], plain[name]) for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


def small_llama():
    torch.manual_seed(3)
    settings = dict(SMALL, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_rank_pattern": {"q_prj": 2.0}}, "lora_rank_pattern: 'q_prj' matches no layer with LoRA"),
        ({"lora_rank_pattern": {"up_proj": 2.0}}, "those are q_proj, k_proj, v_proj, o_proj"),
        ({"lora_rank_pattern": {"q_proj": 2.5}}, "q_proj has rank 2.5: give a whole number"),
        ({"lora_alpha_pattern": {"q_proj": 0.0}}, "lora_alpha_pattern: q_proj is 0: must be above 0"),
        ({"lora_alpha_pattern": {"(": 1.0}}, "'(' is no regular expression"),
    ],
)
def test_a_pattern_that_means_nothing_is_an_error(options, words):
    with pytest.raises(SourceError) as caught:
        with_lora(small_llama(), LLMConfig(lora_r=4, **options), "small")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 holds its weights transposed
def test_dora_is_merged_as_peft_merges_it(family, tmp_path):
    torch.manual_seed(5)
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32)
    base = small_llama() if family == "llama" else GPT2LMHeadModel(gpt2).eval()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    llm = with_lora(base, LLMConfig(lora_r=4, lora_alpha=6, lora_dora=True), "small").eval()
    ids = torch.tensor([[1, 2, 3]])
    for name, parameter in llm.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.add_(torch.randn_like(parameter))
    expected = llm(ids).logits
    llm.save_pretrained(tmp_path)
    merge = LoRAMerge(tmp_path)
    ours = {name: merge(name, tensor) for name, tensor in plain.items()}
    merge.check_all_used()
    merged = llm.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    merged.load_state_dict(ours)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def logits(model: Soundwave) -> torch.Tensor:
    return model.llm(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits


def randomise(model: Soundwave) -> Soundwave:
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "then, now",
    [
        ({"lora_r": 4}, {"lora_r": 4}),
        ({"lora_r": 4}, {"lora_r": 7}),
        ({"lora_r": 4, "lora_alpha": 8}, {"lora_r": 4, "lora_alpha": 3, "lora_rslora": True}),
        (
            {"lora_r": 2, "lora_rank_pattern": {"q_proj": 3.0}, "lora_alpha_pattern": {"v_proj": 5.0}},
            {"lora_r": 6, "lora_rslora": True, "lora_alpha_pattern": {"layers.0.self_attn.q_proj": 2.0}},
        ),
    ],
)
def test_lora_of_another_rank_and_scale_starts_with_the_same_function(bases, then, now, dora, tmp_path):
    old = randomise(tiny.soundwave(*bases, lora_dora=dora, **then))
    artifact.save(old, tmp_path / "old")
    new = tiny.soundwave(*bases, lora_dora=dora, **now)
    with torch.no_grad():
        fresh = logits(new)
    assert "lora" in artifact.load_trained(new, tmp_path / "old")
    expected, found = logits(old), logits(new)
    assert float((expected - fresh).abs().max()) > 1e-2  # the old LoRA does something
    if then == now:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for name, parameter in new.llm.named_parameters():
        if "lora_B" in name:  # the new columns learn
            assert parameter.grad.abs().sum(0).min() > 0, name


def test_a_lower_rank_is_refused_and_merging_works(bases, tmp_path):
    old = randomise(tiny.soundwave(*bases, lora_r=4))
    artifact.save(old, tmp_path / "old")
    new = tiny.soundwave(*bases, lora_r=2)
    with pytest.raises(
        FolderError, match=r"has rank 4 .* asks for 2, .* --merge --with-encoder --out DIR"
    ) as found:
        artifact.check_fit(new, tmp_path / "old")
    assert "\n" not in str(found.value)
    merged = export(tmp_path / "old", tmp_path / "merged", merge=True, with_encoder=True)
    new = tiny.soundwave(bases[0], str(merged / "llm"), lora_r=2)
    artifact.load_trained(new, merged)
    torch.testing.assert_close(logits(new), logits(old), rtol=1e-4, atol=1e-5)


def test_dora_and_lora_do_not_start_from_each_other(bases, tmp_path):
    artifact.save(tiny.soundwave(*bases, lora_r=2, lora_dora=True), tmp_path / "old")
    with pytest.raises(FolderError, match="its LoRA does not fit model.llm"):
        artifact.load_trained(tiny.soundwave(*bases, lora_r=2), tmp_path / "old")


def test_lists_of_names_are_kept_as_they_are():
    assert lora_targets(meta("llama"), ["v_proj", "q_proj"], "x") == ["v_proj", "q_proj"]
