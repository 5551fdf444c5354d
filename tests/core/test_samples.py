"""The one answer, question and target language of a sample, and everyone who asks for them."""

import pytest

from core.samples import (
    INSTRUCTIONS,
    PromptError,
    answer_language,
    answer_of,
    asked,
    messages_of,
    question_of,
    target_language,
)
from data_tools.corpora import Entry
from data_tools.instruct import answer_to
from evaluation.run import prediction_row
from evaluation.tasks import reference_of
from model.prompt import IGNORED, chat_ids
from tests.model import tiny

CHAT = [
    {"role": "user", "content": "<audio_patch>\nWhat?"},
    {"role": "assistant", "content": "A bird."},
    {"role": "user", "content": "Which one?"},
    {"role": "assistant", "content": "A wren."},
]
SAMPLES = [  # sample, answer, question
    ({"task": "asr", "text": "hi", "duration": 1.0}, "hi", INSTRUCTIONS["asr"]),
    ({"text": "hi", "duration": 1.0}, "hi", INSTRUCTIONS["asr"]),
    (
        {"task": "asr", "text": "HI", "response": "Hi.", "prompt": "Write it down.", "duration": 1.0},
        "Hi.",
        "Write it down.",
    ),
    ({"task": "asr", "text": "hi", "label": "happy", "duration": 1.0}, "hi", INSTRUCTIONS["asr"]),
    (
        {"task": "translation", "text": "hi", "response": "hola", "target_lang": "Spanish", "duration": 1.0},
        "hola",
        "Please translate the following audio into Spanish.",
    ),
    ({"task": "gender", "text": "hi", "label": "female", "duration": 1.0}, "female", INSTRUCTIONS["gender"]),
    (
        {"task": "sound", "text": "the sound is rain", "label": "rain", "duration": 1.0},
        "rain",
        INSTRUCTIONS["sound"],
    ),
    (
        {"task": "sound", "text": "the sound is rain", "duration": 1.0},
        "the sound is rain",
        INSTRUCTIONS["sound"],
    ),
    ({"task": "quiz", "label": 0, "duration": 1.0, "prompt": "How many?"}, "0", "How many?"),
    (
        {"task": "chat", "messages": CHAT, "text": "what is it", "response": "not this", "duration": 1.0},
        "A wren.",
        "Which one?",
    ),
    ({"task": "text", "prompt": "2 + 2?", "response": "4"}, "4", "2 + 2?"),
    ({"task": "asr", "messages": CHAT[:2], "text": "what", "duration": 1.0}, "A bird.", "What?"),
]


@pytest.mark.parametrize(("sample", "answer", "question"), SAMPLES)
def test_training_validation_and_evaluation_have_one_answer_and_one_question(sample, answer, question):
    assert (answer_of(sample), question_of(sample)) == (answer, question)
    tokenizer = tiny.tokenizer("chatml", ("<audio_patch>",))
    chat = messages_of(sample)
    assert chat[-1] == {"role": "assistant", "content": answer} and question in chat[-2]["content"]
    ids, labels = chat_ids(tokenizer, chat)
    assert tokenizer.decode([i for i in labels if i != IGNORED]).endswith(f"{answer}<|im_end|>")
    assert reference_of(sample) == answer
    row = prediction_row(sample | {"id": "1"}, "x", "x", "greedy")
    assert (row["reference"], row["prompt"]) == (answer, question)
    assert prediction_row(sample | {"id": "1"}, "x", "x", "ctc")["reference"] == sample.get("text", "")


@pytest.mark.parametrize(
    "sample",
    [
        {"task": "asr", "duration": 1.0},
        {"task": "gender", "text": "good morning", "duration": 1.0},
        {"task": "chat", "text": "x", "duration": 1.0},
        {"task": "asr", "text": "   ", "duration": 1.0},
        {"task": "asr", "text": ["a"], "duration": 1.0},
        {"response": "4"},
    ],
)
def test_a_transcript_is_no_answer_to_another_question(sample):
    with pytest.raises(PromptError):
        messages_of(sample)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        ["hello"],
        [{"role": "user", "content": [{}]}],
        [{"content": "x"}],
    ],
)
def test_turns_that_are_none_are_refused_by_number(messages):
    with pytest.raises(PromptError, match="turn 1"):
        messages_of({"messages": messages})


def test_a_chat_that_a_user_ends_has_no_answer():
    assert answer_of({"messages": CHAT[:3]}) is None and reference_of({"messages": CHAT[:3]}) == ""
    assert question_of({"messages": CHAT[:3]}) == "Which one?"


def test_a_corpus_entry_answers_by_the_same_rule():
    entry = Entry(id="1", text="good morning", response="buenos días", label="Dog_bark")
    assert [answer_to(task, entry) for task in ("asr", "translation", "chat")] == [
        "good morning",
        "buenos días",
        "buenos días",
    ]
    assert answer_to("sound", Entry(id="1", label="Dog_bark")) == "dog bark"
    assert answer_to("emotion", Entry(id="1", text="hi")) is None


@pytest.mark.parametrize(
    ("sample", "target"),
    [
        ({"task": "translation", "target_lang": "Chinese", "prompt": "Into French."}, "zh"),
        ({"target_lang": "zh-CN"}, "zh"),
        (
            {
                "messages": [
                    {"role": "user", "content": "<audio_patch>\nTranslate into Chinese."},
                    {"role": "assistant", "content": "你好"},
                ]
            },
            "zh",
        ),
        ({"prompt": "Translate it into French."}, "fr"),
        ({"prompt": "把音频翻译成中文。"}, None),
        ({"task": "translation"}, None),
    ],
)
def test_the_target_language_is_what_the_data_says(sample, target):
    assert target_language(sample) == target


def test_the_language_of_an_answer_is_a_translation_s_target():
    assert answer_language({"task": "asr", "lang": "de"}) == "de"
    assert answer_language({"task": "translation", "lang": "de", "target_lang": "Thai"}) == "th"
    assert answer_language({"task": "translation", "lang": "de"}) == "en", (
        "what its default instruction asks for"
    )
    assert answer_language({"task": "translation", "lang": "de", "prompt": "翻译"}) is None


def test_a_question_is_text_behind_its_audio():
    assert asked("Why?") == {"role": "user", "content": "<audio_patch>\nWhy?"}
    assert (
        asked("") == {"role": "user", "content": "<audio_patch>"}
        and asked("Why?", audios=0)["content"] == "Why?"
    )
    assert asked("<audio_patch>?") == {
        "role": "user",
        "content": "<audio_patch>\n<audio_patch>?",
        "audios": 1,
    }
