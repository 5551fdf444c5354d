"""Random two-layer models of many of transformers' decoder families, as its AutoConfig makes them."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Names of sizes that only some families have; each gets those that its config knows.
OTHER_SIZES = dict(
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    shared_expert_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # older ways to say width, layers and heads
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=512,
    n_inner=64,
    d_model=32,
    n_heads=4,
    n_layers=2,
    num_layers=2,
    attention_heads=4,
    ffn_dim=64,
    max_seq_len=512,
    expansion_ratio=2,
    word_embed_proj_dim=32,
    rotary_dim=4,
    # latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    # states
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_dt_rank=4,
    state_size=8,
    n_groups=1,
    num_heads=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    expand=2,
    chunk_size=16,
    mamba_chunk_size=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    # attention over part of the row
    sliding_window=8,
    attention_chunk_size=16,
    attention_window_size=8,
)
SPECIAL = {
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "minimax": dict(block_size=4, layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "bamba": dict(attn_layer_indices=[1]),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "recurrent_gemma": dict(lru_width=32, block_types=["recurrent", "attention"]),
    "nemotron_h": dict(hybrid_override_pattern="M*"),
    "mamba2": dict(head_dim=8, num_heads=8),
    "falcon_h1": dict(mamba_d_ssm=64),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"],
        mamba_ngroups=1,
        n_mamba_heads=8,
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8, num_heads=4),
    "gemma3n_text": dict(
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        laurel_rank=4,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    ),
    "gemma4_text": dict(
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    ),
    "llama4_text": dict(intermediate_size_mlp=64),
    "deepseek_v3": dict(num_key_value_heads=4),
}
WITHOUT = {
    "falcon": {"head_dim"},
    "deepseek_v2": {"head_dim", "num_key_value_heads"},
    "deepseek_v3": {"head_dim"},
}


def config(family: str, **more):
    made = AutoConfig.for_model(family).__class__
    known = set(inspect.signature(made.__init__).parameters) | set(getattr(made, "__dataclass_fields__", ()))
    sizes = {
        **{name: value for name, value in OTHER_SIZES.items() if name in known},
        **SIZES,
        **SPECIAL.get(family, {}),
        **more,
    }
    return AutoConfig.for_model(
        family, **{name: value for name, value in sizes.items() if name not in WITHOUT.get(family, ())}
    )


def llm(family: str, attention: str | None = None, seed: int = 0, **more) -> PreTrainedModel:
    """In eval mode, its own noise off, weights so large that every part has a say."""
    from model.language_model import without_noise

    made = without_noise(config(family, **more))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.requires_grad_(False)
