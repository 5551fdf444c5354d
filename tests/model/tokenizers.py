"""Tokenizers and chat templates in the style of known families, made on the spot: control tokens of several
kinds, models of several kinds (byte-level BPE, BPE with byte fallback, Unigram, SentencePiece itself)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

AUDIO = "<audio_patch>"
CORPUS = [
    "the wall and the water, what is said here?",
    "Please transcribe the following audio.\n\nHello there",
    "user system assistant",
    "a  b   c\n\n\nd <b> [c] {d} | e",
    "Guten Tag, wie geht es dir?",
    "今天天气很好",
    "end start of turn",
] * 3


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]  # with special=True
    added: tuple[str, ...] = ()  # added, not special
    bos: str | None = None
    eos: str | None = None
    model: str = "bytes"  # bytes | fallback | unigram
    strips: bool = False  # special tokens take the white space behind them along (Phi-3)
    system: bool = True  # the template takes a system turn


LLAMA3 = Family(
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = "
    "messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Today Date: ' + date_string + '\\n\\n' }}"
    "{{- system_message + '<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
    "'<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' "
    "}}{%- endif %}",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_0|>",
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
QWEN2 = Family(
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in "
    "messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == "
    "'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- "
    "endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>"),
    eos="<|im_end|>",
)
QWEN3 = Family(
    "{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}{%- for message in "
    "messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.searching and message.role == 'user' "
    "and not "
    "(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.searching = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for "
    "message in messages %}"
    "{%- set content = message.content %}{%- if message.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}{%- set reasoning = "
    "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + "
    "content.lstrip('\\n') }}"
    "{%- else %}"
    "{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ("<think>", "</think>", "<tool_call>", "<tool_response>", "</tool_response>"),
    eos="<|im_end|>",
)
GEMMA = Family(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = "
    "message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
    ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    ("<unused7>", "[multimodal]", "<table>", "\n\n", "▁▁"),
    bos="<bos>",
    eos="<eos>",
    model="fallback",
    system=False,
)
PHI3 = Family(
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] "
    "+ '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    (
        "<unk>",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|user|>",
        "<|placeholder1|>",
    ),
    bos="<s>",
    eos="<|endoftext|>",
    model="fallback",
    strips=True,
)
MISTRAL = Family(
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}{% else %}{{ ' ' + message['content'] "
    "+ eos_token }}"
    "{% endif %}{% endfor %}",
    (
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[control_8]",
    ),
    bos="<s>",
    eos="</s>",
    model="fallback",
)
UNIGRAM = Family(
    QWEN2.template.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"),
    ("<unk>", "<s>", "</s>"),
    ("<mask_1>",),
    bos="<s>",
    eos="</s>",
    model="unigram",
)
FAMILIES = {
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "phi3": PHI3,
    "mistral": MISTRAL,
    "unigram": UNIGRAM,
}


@cache
def made(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a family, with the audio token."""
    family = FAMILIES[name]
    backend = {"bytes": _bytes, "fallback": _fallback, "unigram": _unigram}[family.model](family)
    for token in family.special:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=family.strips)])
    for token in family.added:
        backend.add_tokens([AddedToken(token, special=False, normalized=token.isspace() or token == "▁▁")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if "<unk>" in family.special else None,
    )
    tokenizer.add_tokens([AddedToken(AUDIO, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = family.template
    return tokenizer


def _bytes(family: Family) -> Tokenizer:
    """GPT-2's kind, as Llama 3 and Qwen have it."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _fallback(family: Family) -> Tokenizer:
    """SentencePiece's BPE as converted: blanks become ▁, unknown characters their bytes; Gemma puts no ▁ in
    front, Llama 2 does. The control tokens are entries of the vocabulary, too."""
    names = [*family.special, *(f"<0x{value:02X}>" for value in range(256))]
    letters = sorted(
        {
            character
            for line in CORPUS
            for character in line.replace(" ", "▁")
            if character.isascii() or character == "▁"
        }
    )
    words = ["th", "the", "▁the", "he", "▁▁", "▁a", "wa", "\n\n", "▁<", "|>"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("h", "e"),
        ("▁", "▁"),
        ("▁", "a"),
        ("w", "a"),
        ("\n", "\n"),
        ("▁", "<"),
        ("|", ">"),
    ]
    letters = sorted({*letters, *"<>|\n"})
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*names, *letters, *words]))}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(
        [*([] if family is GEMMA else [normalizers.Prepend("▁")]), *steps]
    )
    strip = [] if family is GEMMA else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _unigram(family: Family) -> Tokenizer:
    """The model spells control tokens and byte tokens from text by itself: they are pieces like any other."""
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((f"<0x{value:02X}>", -9.0) for value in range(256)),
    ]
    known = {piece for piece, _ in pieces}
    letters = sorted(
        {character for line in CORPUS for character in line.replace(" ", "▁")} | set("<>/|0123456789xABCDEF_")
    )
    pieces += [(letter, -6.0) for letter in letters if letter not in known] + [("▁the", -4.0), ("he", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return backend


@cache
def slow(folder: str) -> PreTrainedTokenizerBase:
    """SentencePiece's own library, with a turn's markers as its user-defined symbols, which it keeps whole
    whatever is asked."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        character_coverage=1.0,
        hard_vocab_limit=False,
    )
    path = f"{folder}/tokenizer.model"
    with open(path, "wb") as file:
        file.write(model.getvalue())
    tokenizer = SentencePieceBackend(
        vocab_file=path, bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False
    )
    tokenizer.add_tokens([AddedToken(AUDIO, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    return tokenizer
