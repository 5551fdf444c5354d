"""Tiny models made on the spot: a Whisper, LLMs of several families, and tokenizers with chat templates."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    ParakeetCTCConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Wav2Vec2BertConfig,
    WhisperConfig,
    WhisperModel,
)

from core.ctc_text import ctc_target_ids
from model.batch import Batch
from model.config import AlignmentConfig, EncoderConfig, LLMConfig, SoundwaveConfig
from model.prompt import chat_ids
from model.soundwave import Soundwave

LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
SPECIALS = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA}
ENDS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<bos>", "<eos>"),
}


def tokenizer(
    style: str = "chatml", extra: tuple[str, ...] = (), adds_bos: bool | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level (256 bytes, a few merged words, special tokens), with the chat template of a family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("l", "l"), ("Ġ", "w")]
    vocabulary = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*SPECIALS[style], *extra)]
    )
    begin, end = ENDS[style]
    if adds_bos if adds_bos is not None else style == "llama3":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end)
    made.chat_template = TEMPLATES[style]
    return made


#: Sizes of encoders that read the waveform (wav2vec 2.0, HuBERT, WavLM ...).
SPEECH_SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8, 8),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 8, 8),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def whisper(
    folder: Path, *, width: int = 24, layers: int = 2, heads: int = 2, mels: int = 16, positions: int = 1500
) -> str:
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        num_mel_bins=mels,
        vocab_size=40,
        max_source_positions=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    for parameter in model.parameters():  # positions and biases too: nothing may be right by being zero
        parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return str(folder)


def conformer(folder: Path, whole: type[PreTrainedModel], **options) -> PreTrainedModel:
    """A random w2v-BERT 2.0 or Parakeet of transformers' class `whole`, saved with its head."""
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    if whole.__name__.startswith("Wav2Vec2Bert"):
        config = Wav2Vec2BertConfig(
            **small, conv_depthwise_kernel_size=5, vocab_size=9, apply_spec_augment=False, **options
        )
    else:
        inner = ParakeetEncoderConfig(
            **small, **{"subsampling_conv_channels": 8, "conv_kernel_size": 5, "num_mel_bins": 16, **options}
        )
        config = ParakeetCTCConfig(encoder_config=inner, vocab_size=9, pad_token_id=8)
        config = inner if whole is ParakeetEncoder else config
    model = whole(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float("norm" in name and "weight" in name), 0.2)
    for name, statistic in model.named_buffers():  # of batch norm, which must not be its start values
        if name.endswith("running_mean"):
            statistic.normal_(0, 0.2)
        elif name.endswith("running_var"):
            statistic.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


FAMILIES = {
    "llama": dict(style="llama3", tie=False),
    "llama_tied": dict(style="chatml", tie=True),
    "qwen2": dict(style="chatml", tie=True),
    "gemma": dict(style="gemma", tie=True),
    "gemma2": dict(style="gemma", tie=True),
    "gemma3_text": dict(style="gemma", tie=True),
    "qwen3": dict(style="chatml", tie=False),
}
# Families whose rows are not joined (model/rows.py), with the sizes that others lack.
PADDED_FAMILIES = {
    "gpt_oss": dict(style="chatml", tie=False, num_local_experts=4, num_experts_per_tok=2),
    "lfm2": dict(style="chatml", tie=True, layer_types=["conv", "full_attention"]),
}


def llm(
    folder: Path,
    family: str = "llama_tied",
    *,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    spare_rows: int = 0,
    extra_tokens: tuple[str, ...] = (),
) -> str:
    """A random LLM of a family with its tokenizer; `spare_rows`: vocabulary padded beyond the tokenizer."""
    more = dict((FAMILIES | PADDED_FAMILIES)[family])
    style, tie = more.pop("style"), more.pop("tie")
    words = tokenizer(style, extra_tokens)
    sizes = dict(
        vocab_size=len(words) + spare_rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=None,
        **more,
    )
    config = AutoConfig.for_model(family.removesuffix("_tied"), **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif (
                family == "gemma3_text" and "layernorm" in name
            ):  # gain 1 + w: from 1, no layer outweighs the last token
                parameter.fill_(4.0)
    model.generation_config = GenerationConfig(
        eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def config(encoder: str, llm_folder: str, **alignment) -> SoundwaveConfig:
    return SoundwaveConfig(
        encoder=EncoderConfig(name=encoder),
        llm=LLMConfig(name=llm_folder, lora_r=4),
        alignment=AlignmentConfig(**alignment),
    )


def soundwave(encoder: str, llm_folder: str, **options) -> Soundwave:
    """The whole network, for inference; options: of LLMConfig."""
    made = config(encoder, llm_folder)
    made.llm = LLMConfig(name=llm_folder, **options)
    return Soundwave.build(made).eval()


def batch(
    model,
    chats: list[list[dict]],
    seconds: list[float],
    texts: list[str | None],
    *,
    seed: int = 0,
    left: bool = False,
    style: str = "chat",
) -> Batch:
    """Chats with random audio; `seconds` and `texts` (transcripts) have one entry per audio. No audio: a
    dummy."""
    generator = torch.Generator().manual_seed(seed)
    sounds = [0.1 * torch.randn(round(s * 16000), generator=generator) for s in seconds]
    return batch_of(model, chats, sounds, texts, left=left, style=style)


def batch_of(
    model,
    chats: list[list[dict]],
    sounds: list[torch.Tensor],
    texts: list[str | None],
    *,
    left: bool = False,
    style: str = "chat",
) -> Batch:
    words = model.tokenizer
    dummy = not sounds
    if dummy:
        sounds, texts = [torch.zeros(1600)], [None]
    waveforms = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
    targets = [ctc_target_ids(words, t) if t else [] for t in texts]
    ctc = torch.zeros(len(sounds), max(1, *map(len, targets)), dtype=torch.long)
    for row, ids in enumerate(targets):
        ctc[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    pairs = [chat_ids(words, chat, style) for chat in chats]
    longest = max((len(ids) for ids, _ in pairs), default=0)
    shape = (len(chats), longest)
    input_ids, mask, labels = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
    )
    for row, (ids, label) in enumerate(pairs):
        at = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        input_ids[row, at], mask[row, at], labels[row, at] = torch.tensor(ids), 1, torch.tensor(label)
    return Batch(
        waveforms,
        None,
        torch.tensor([len(s) for s in sounds]),
        dummy,
        ctc,
        torch.tensor([len(t) for t in targets]),
        torch.tensor([bool(t) for t in targets]),
        input_ids,
        mask,
        labels,
        audio_keys=torch.arange(len(sounds)),
        row_keys=torch.arange(len(chats)),
    )


def chat(prompt: str, answer: str | None = None, audio: bool = True) -> list[dict]:
    turns = [{"role": "user", "content": ("<audio_patch>\n" if audio else "") + prompt}]
    return turns + ([{"role": "assistant", "content": answer}] if answer is not None else [])
