"""The sample schema: what a packed sample asks and what it answers. Training, validation, evaluation and data
tools use these.

The answer is what a model is trained to write and what its prediction is scored against: the last assistant's
turn of `messages`; else `response`; else, by task, the transcript (`asr`), the label or the transcript
(`sound`), the label (all others).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from core.console import OneLine, shown
from core.languages import language_code, named_language

AUDIO_TOKEN = "<audio_patch>"
# Asked where a sample brings no prompt of its own.
INSTRUCTIONS = {
    "asr": "Please transcribe the following audio.",
    "translation": "Please translate the following audio into {lang}.",
    "emotion": "What is the emotion of the speaker?",
    "gender": "What is the gender of the speaker?",
    "sound": "What is the sound?",
    "instrument": "Which instrument is playing?",
    "genre": "What is the genre of this music?",
    "mood": "What is the mood of this music?",
    "tempo": "What is the tempo of this music in beats per minute?",
    "caption": "Describe this audio.",
    "chain": "Please transcribe the following audio and then answer based on the audio's transcription.",
}
ANSWERED_BY_TEXT = ("asr", "sound")  # tasks to which a transcript is an answer
_ANSWERS = {"asr": ("text",), "sound": ("label", "text")}
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class PromptError(OneLine, ValueError):
    """A conversation that cannot be expressed; one line."""


def _filled(sample: Mapping, key: str) -> str | None:
    """Return a field as text; None where it is missing or blank. Numbers count as what they look like."""
    value = sample.get(key)
    if value is None or isinstance(value, (list, dict)):
        return None
    return str(value) if str(value).strip() else None


def _answer_keys(task: str) -> tuple[str, ...]:
    return "response", *_ANSWERS.get(task, ("label",))


def task_of(sample: Mapping) -> str:
    return sample.get("task") or "asr"


def answer_of(sample: Mapping) -> str | None:
    """Return the text that a sample teaches and is scored against; None where it has none."""
    if messages := sample.get("messages"):
        last = messages[-1]
        return (
            str(last["content"])
            if last.get("role") == "assistant" and last.get("content") is not None
            else None
        )
    return next(
        (text for key in _answer_keys(task_of(sample)) if (text := _filled(sample, key)) is not None), None
    )


def transcript_of(sample: Mapping) -> str:
    """Return what is said in a sample's audio, the target of CTC; empty where that is not known."""
    return _filled(sample, "text") or ""


def question_of(sample: Mapping, audio_token: str = AUDIO_TOKEN) -> str:
    """Return what a sample asks, without its audio's place: the last user's turn of `messages`, else
    `prompt`, else the instruction of its task."""
    if messages := sample.get("messages"):
        questions = [str(turn.get("content") or "") for turn in messages if turn.get("role") == "user"]
        return questions[-1].replace(audio_token, "").strip("\n") if questions else ""
    instruction = INSTRUCTIONS.get(task_of(sample), "") if sample.get("duration") else ""
    return _filled(sample, "prompt") or instruction.replace("{lang}", sample.get("target_lang") or "English")


def target_language(of: Mapping) -> str | None:
    """Return the code of a translation's target, of a sample or a prediction: its `target_lang` (a name or a
    code), else the language that its question asks for ("... into French"); None where neither says."""
    if language := of.get("target_lang"):
        return language_code(language)
    question = question_of(of) if of.get("prompt") or of.get("messages") else ""
    for preposition in (r"\binto", r"(?<!listen )\bto", r"\bin"):  # "what is said in English, into French"
        for phrase in re.findall(rf"(?i:{preposition})\s+((?:[A-Z]\w+\s*){{1,2}})", question):
            if code := named_language(phrase.strip()):
                return code
    return None


def answer_language(sample: Mapping) -> str | None:
    """Return the language in which a sample is answered, as it is written in the data: a translation's
    target, else `lang`."""
    if task_of(sample) != "translation":
        return sample.get("lang")
    return target_language(sample) or (None if sample.get("prompt") or sample.get("messages") else "en")


def messages_of(sample: Mapping, audio_token: str = AUDIO_TOKEN) -> list[dict]:
    """Return a packed sample's JSON as a chat: its own `messages`, or (audio +) question and answer.

    A turn is {"role", "content"}. In `messages` an audio stands wherever `audio_token` does; elsewhere it
    stands before the question, and the token's name in prompts and answers is text. Such a turn has `audios`
    besides: how many of its audio tokens, counted from the first, are audio. A sample without `duration` has
    no audio. Errors: PromptError where there is nothing to answer or to ask.
    """
    if sample.get("messages"):
        return [_turn(number, turn) for number, turn in enumerate(sample["messages"], 1)]
    task, answer = task_of(sample), answer_of(sample)
    if answer is None:
        raise PromptError(f"sample of task {task} has no {' or '.join(_answer_keys(task))} to answer with")
    question, has_audio = question_of(sample), bool(sample.get("duration"))
    if not has_audio and not question:
        raise PromptError("sample has neither audio nor a prompt")
    return [asked(question, audio_token, audios=int(has_audio)), _text_turn("assistant", answer, audio_token)]


def asked(question: str, audio_token: str = AUDIO_TOKEN, audios: int = 1) -> dict:
    """Return a user's turn: so many audios, then the question, which is text whatever it holds."""
    content = "\n".join([*[audio_token] * audios, question]).rstrip("\n") if audios else question
    turn = {"role": "user", "content": content}
    return turn | {"audios": audios} if audio_token in question else turn


def _text_turn(role: str, text: str, audio_token: str) -> dict:
    turn = {"role": role, "content": text}
    return turn | {"audios": 0} if audio_token in text else turn


def _turn(number: int, turn: object) -> dict:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise PromptError(
            f"turn {number} of its messages holds no text: each needs a role and a content that is text"
        )
    check_role(number, turn.get("role"))
    return {"role": turn["role"], "content": turn["content"]}


def check_role(number: int, role: object) -> None:
    """Errors: PromptError for a role that is not one word: chat templates write it between control tokens."""
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise PromptError(f"turn {number} has the role {shown(role)}: system, user or assistant")


def prompt_of(messages: list[dict]) -> list[dict]:
    """Return the chat up to its last answer: what a model is to continue."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
