"""Chats to ids and labels against the templates' own rendering; CTC targets; the official checkpoint's prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ctc_text import ctc_target_ids, normalise
from model.prompt import IGNORED, RELEASE_SYSTEM, PromptError, chat_ids, messages_of, prompt_of, stop_ids
from tests.model import tiny

MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<audio_patch>\nWhat is said?"},
    {"role": "assistant", "content": "the wall"},
    {"role": "user", "content": "And here <audio_patch> or <audio_patch>?"},
    {"role": "assistant", "content": "Nothing."},
]
END = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}


def words_of(style):
    return tiny.tokenizer(style, ("<audio_patch>",))


@pytest.mark.parametrize("style", list(END))
def test_labels_are_the_assistants_words_and_their_end(style):
    words = words_of(style)
    ids, labels = chat_ids(words, MULTI)
    assert words.decode(ids) == words.apply_chat_template(MULTI, tokenize=False)
    assert words.decode([i for i in labels if i != IGNORED]) == f"the wall{END[style]}Nothing.{END[style]}"
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    assert ids.count(words.convert_tokens_to_ids("<audio_patch>")) == 3
    assert words.convert_tokens_to_ids(END[style]) in stop_ids(words) and len(stop_ids(words)) <= 2


@pytest.mark.parametrize("style", list(END))
def test_what_is_generated_from_is_what_was_learnt(style):
    words = words_of(style)
    for chat in (
        MULTI,
        MULTI[:3],
        messages_of({"task": "asr", "text": " spaced, and\n broken ", "duration": 1.0}),
    ):
        prompt, none = chat_ids(words, prompt_of(chat))
        assert prompt == chat_ids(words, chat)[0][: len(prompt)]
        asked = words.apply_chat_template(prompt_of(chat), tokenize=False, add_generation_prompt=True)
        assert words.decode(prompt) == asked
        assert none[-1] == IGNORED


def test_thoughts_that_a_template_adds_are_no_part_of_the_answer():
    """As Qwen 3's does: an empty block in the last answer, and in its opening where thinking is switched
    off."""
    words = words_of("chatml")
    block = "<think>\n\n</think>\n\n"
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        + block
        + "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}" + block + "{% endif %}{% endif %}"
    )
    ids, labels = chat_ids(words, MULTI[1:3])
    assert words.decode([i for i in labels if i != IGNORED]) == "the wall<|im_end|>"
    prompt, _ = chat_ids(words, MULTI[1:2])
    assert words.decode(prompt).endswith(block) and prompt == ids[: len(prompt)]


def test_a_system_prompt_is_said_where_the_chat_has_none():
    words, chat = words_of("chatml"), MULTI[1:3]
    assert chat_ids(words, chat, system="Listen.") == chat_ids(
        words, [{"role": "system", "content": "Listen."}, *chat]
    )
    assert chat_ids(words, MULTI, system="Listen.") == chat_ids(words, MULTI)
    assert len(chat_ids(words, chat, system="")[0]) < len(chat_ids(words, chat, system="Listen.")[0])
    refusing = words_of("chatml")
    refusing.chat_template = (
        "{{ raise_exception('System role not supported') }}"  # as Gemma's does for a system turn
    )
    with pytest.raises(PromptError, match="refuses this conversation: System role"):
        chat_ids(refusing, chat, system="Listen.")


def test_samples_become_chats():
    asr = messages_of({"task": "asr", "text": "hi", "duration": 2.0})
    assert asr == [
        {"role": "user", "content": "<audio_patch>\nPlease transcribe the following audio."},
        {"role": "assistant", "content": "hi"},
    ]
    translation = messages_of(
        {"task": "translation", "text": "hi", "response": "hola", "target_lang": "Spanish", "duration": 1}
    )
    assert "Spanish" in translation[0]["content"] and translation[1]["content"] == "hola"
    assert messages_of({"prompt": "2 + 2?", "response": "4"})[0]["content"] == "2 + 2?"
    assert (
        messages_of({"task": "gender", "label": "female", "text": "x", "duration": 1})[1]["content"]
        == "female"
    )
    assert messages_of({"messages": MULTI}) == MULTI
    assert messages_of({"task": "asr", "label": "angry", "text": "x", "duration": 1})[1]["content"] == "x"
    assert (
        messages_of({"task": "sound", "label": "rain", "text": "the sound is rain", "duration": 1})[1][
            "content"
        ]
        == "rain"
    )
    for nothing in (
        {"task": "asr", "duration": 1.0, "text": ""},
        {"response": "4"},
        {"task": "asr", "label": "a", "duration": 1},
        {"task": "gender", "text": "good morning", "duration": 1},
    ):
        with pytest.raises(PromptError):
            messages_of(nothing)


def test_release_prompt_ids_piece_by_piece():
    """Each call of a Llama 3 tokenizer begins with BOS; the official prompt keeps them all."""
    words = words_of("llama3")
    begin, start, end, stop = (
        words.convert_tokens_to_ids(t)
        for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )

    def plain(text):
        return words.encode(text, add_special_tokens=False)

    question = "What is the wall?"
    expected = [
        begin,
        start,
        begin,
        *plain("system"),
        end,
        begin,
        *plain("\n"),
        begin,
        *plain(RELEASE_SYSTEM),
        stop,
        start,
        begin,
        *plain("user"),
        end,
        begin,
        *plain("\n"),
        words.convert_tokens_to_ids("<audio_patch>"),
        begin,
        *plain(question),
        stop,
        start,
        begin,
        *plain("assistant"),
        end,
        begin,
        *plain("\n"),
    ]
    chat = [{"role": "user", "content": f"<audio_patch>\n{question}"}]
    ids, labels = chat_ids(words, chat, "release")
    assert ids == expected and set(labels) == {IGNORED}
    learnt, labels = chat_ids(words, [*chat, {"role": "assistant", "content": "a wall"}], "release")
    assert learnt[: len(ids)] == ids and [i for i in labels if i != IGNORED] == [
        begin,
        *plain("a wall"),
        stop,
    ]
    assert stop_ids(words, "release") == [stop]
    with pytest.raises(PromptError, match="needs Llama 3's tokenizer"):
        chat_ids(words_of("chatml"), chat, "release")
    with pytest.raises(PromptError, match="one <audio_patch> at the beginning"):
        chat_ids(words, [{"role": "user", "content": "see <audio_patch>"}], "release")


def test_what_cannot_be_expressed_is_refused():
    words = words_of("chatml")
    with pytest.raises(PromptError, match="assistant's turn holds"):
        chat_ids(words, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<audio_patch>"}])
    with pytest.raises(PromptError, match="empty"):
        chat_ids(words, [])
    words.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(PromptError, match="rewrites earlier turns"):
        chat_ids(words, MULTI)
    words.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        chat_ids(words, MULTI)


@pytest.mark.parametrize(
    "text, lower, bare",
    [
        (
            "Don\u2019t STOP, 'quoted' \u2014 ok?",
            "don\u2019t stop, 'quoted' \u2014 ok?",
            "don't stop quoted ok",
        ),
        ("  two   spaces ", "two spaces", "two spaces"),
        ("\u00c9t\u00e9 $5", "\u00e9t\u00e9 $5", "\u00e9t\u00e9 5"),
        ("...", "...", ""),
    ],
)
def test_normalisations(text, lower, bare):
    assert [normalise(text, how) for how in ("raw", "lower", "lower_no_punctuation")] == [text, lower, bare]
    with pytest.raises(PromptError, match="data.ctc_text is 'upper'"):
        normalise(text, "upper")


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40))
def test_ctc_targets_decode_to_the_text(text):
    words = words_of("chatml")
    ids = ctc_target_ids(words, text, "lower")
    assert words.decode(ids).strip() == normalise(text, "lower").strip()


def test_ctc_targets_hold_no_special_token_and_one_form_a_word():
    words = words_of("chatml")
    ids = ctc_target_ids(words, "the <audio_patch> the<|im_end|>", "lower")
    assert (
        not set(ids) & set(words.all_special_ids) and words.convert_tokens_to_ids("<audio_patch>") not in ids
    )
    the = words.convert_tokens_to_ids("\u0120the")
    assert ids[0] == the and ids.count(the) == 2
    assert ctc_target_ids(words, "  ", "lower") == []
