"""What the network is: every switch of the method, typed, with the paper's meaning as default.

`official_switches()` gives the set that the official checkpoint needs; docs/official-checkpoint.md explains
each difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, with_config

from core.console import OneLine
from core.options import choice, location, matching, names_or_pattern, number, text

# A model folder's soundwave.json is read by these types (model/artifact.py): unknown keys, NaN and infinity
# are errors.
_strict = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


class OptionError(OneLine, ValueError):
    """An option that does not fit the models or the machine; one line: which, why, what to do."""


@_strict
@dataclass
class EncoderConfig:
    """The audio encoder."""

    # A folder with config.json and weights, a hub name, or a preset's name (model/presets/) for --dry-run.
    name: str = location("openai/whisper-large-v3")
    # Encode at the true length (null), or pad every clip with silence to this many seconds (official: 30).
    pad_to_seconds: float | None = number(None, above=0)
    # Longer clips are refused. What is beyond the encoder's own window (Whisper: 30 s) is encoded in windows.
    max_seconds: float = number(300.0, above=0)
    lora_r: int = number(
        0, least=0
    )  # LoRA on the attention's linear layers, for train.encoder: lora; 0: none
    lora_alpha: int = number(16, least=1)


@_strict
@dataclass
class LLMConfig:
    """The language model and its LoRA."""

    name: str = location("meta-llama/Llama-3.1-8B-Instruct")
    lora_r: int = number(64, least=0)  # 0: no LoRA
    lora_alpha: int = number(16, least=1)
    lora_dropout: float = number(0.0, least=0, below=1)
    # null: the linear layers of the LLM's attention | names of linear layers | "all-linear" | a regular
    # expression, as in peft
    lora_targets: Any = names_or_pattern()
    lora_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r
    lora_dora: bool = False  # DoRA: learn the norm of each output's weights apart; not under ZeRO-3
    # How new LoRA starts (model/lora_init.py): default and gaussian draw A, orthogonal draws both factors;
    # pissa and olora take the largest components of the LLM's own weights.
    lora_init: str = matching(
        "default",
        r"default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*",
        "default, gaussian, orthogonal, olora, pissa or pissa_niter_N, e.g. pissa_niter_16",
    )
    # Layers of the LLM that are trained whole beside LoRA, by the end of their names: [norm, lm_head]
    lora_modules_to_save: list[str] = field(default_factory=list)
    # The frozen linear layers in few bits (model/quantised.py); not under ZeRO-3
    quantization: str = choice("none", "none", "nf4", "torchao_int8", "torchao_int4")
    # Other ranks and alphas for some layers, by the end of their names, as in peft: {q_proj: 8}
    lora_rank_pattern: dict[str, float] = field(default_factory=dict)
    lora_alpha_pattern: dict[str, float] = field(default_factory=dict)


@_strict
@dataclass
class AlignmentConfig:
    """Alignment adapter: stack frames -> Linear -> pre-norm Transformer layer(s) -> LayerNorm; then the CTC
    head."""

    stack_frames: int = number(2, least=1)  # encoder frames per adapter frame: 50 -> 25 frames a second
    layers: int = number(1, least=0)
    heads: int | None = number(None, least=1)  # null: as many as the LLM has
    ffn_multiple: float = number(2.0, above=0)  # width of the feed-forward part, in LLM hidden sizes
    dropout: float = number(0.1, least=0, below=1)
    attention: str = choice(
        "time", "time", "frame"
    )  # over the utterance's frames (paper) | each frame alone (release)
    # tied: the LLM's output embeddings, frozen, + one trained blank row | initialised | free
    ctc_head: str = choice("tied", "tied", "initialised", "free")
    # true: after the encoder, only the clip's own frames count | full: the padding's, too (release; only with
    # pad_to_seconds)
    ctc_length: str = choice("true", "true", "full")


@_strict
@dataclass
class ShrinkingConfig:
    """Shrinking adapter: CTC runs -> one query frame per run -> look-back attention, residual, LayerNorm."""

    enabled: bool = True  # false: every frame goes to the LLM (a baseline, not the method)
    keep: str = choice("peak", "peak", "first")  # the run's most probable frame | its first frame (release)
    keep_blank_runs: bool = False  # true: blank runs keep a frame too (release)
    # all: every valid frame of the utterance | kept: CTC peaks only (release) | none
    lookback: str = choice("all", "all", "kept", "none")
    heads: int | None = number(None, least=1)
    dropout: float = number(0.1, least=0, below=1)
    # true: the input embedding of its CTC token is added to a CTC peak (neither in the paper nor in the
    # official checkpoint)
    token_embeddings: bool = False
    # The last LayerNorm's gain starts at the RMS of the LLM's input embeddings, so that its output lies on
    # their scale.
    init_gain_to_embeddings: bool = True


@_strict
@dataclass
class OpsConfig:
    """The fused op (model/ops)."""

    implementation: str = choice("auto", "auto", "cpp", "triton", "reference")
    # Softmax mass below which backward uses a tile's mean row; null: 2^-19 in fp32, 2^-12 in bf16; 0: exact.
    skip_below: float | None = number(None, least=0, below=1)
    deterministic: bool = False


@_strict
@dataclass
class SoundwaveConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    # ctc_peaks (the method) | all_frames | stacked | cif | one of a plugin's (docs/extending.md)
    compressor: str = text("ctc_peaks")
    compressor_options: dict[str, float] = field(default_factory=dict)  # e.g. {stack: 5}, by the compressor
    shrinking: ShrinkingConfig = field(default_factory=ShrinkingConfig)  # of ctc_peaks
    ops: OpsConfig = field(default_factory=OpsConfig)
    prompt: str = choice(
        "chat", "chat", "release"
    )  # the tokenizer's own chat template | the official checkpoint's prompt
    # Said before each conversation that brings no system turn of its own; null: what the template itself
    # says, "": nothing.
    system_prompt: str | None = None
    audio_token: str = text(
        "<audio_patch>"
    )  # its one position in the prompt is replaced by the audio; it is also CTC's blank
    # auto: flash_attention_2 when it can, else sdpa
    attention_implementation: str = choice("auto", "auto", "flash_attention_2", "sdpa", "eager")
    dtype: str = choice("float32", "float32", "bfloat16", "float16")  # weights of the frozen parts


def official_switches(config: SoundwaveConfig) -> SoundwaveConfig:
    """Set the options that the official checkpoint was trained with (docs/official-checkpoint.md), in
    place."""
    config.encoder.pad_to_seconds = 30.0
    config.alignment.attention = "frame"
    config.alignment.ctc_head = "free"
    config.alignment.ctc_length = "full"
    config.shrinking.keep = "first"
    config.shrinking.keep_blank_runs = True
    config.shrinking.lookback = "kept"
    config.shrinking.init_gain_to_embeddings = False
    config.prompt = "release"
    return config
