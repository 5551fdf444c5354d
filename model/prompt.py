"""Text in and out of the tokenizer: chats to token ids with labels, samples to chats, transcripts to CTC targets."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from core.console import OneLine, one_line

IGNORED = -100
# Llama 3.x templates print a date, by default today's: a training prompt must not depend on the day.
_TEMPLATE_DATE = "26 Jul 2024"

# Said where a sample brings no prompt of its own.
INSTRUCTIONS = {
    "asr": "Please transcribe the following audio.",
    "translation": "Please translate the following audio into {lang}.",
    "emotion": "What is the emotion of the speaker?",
    "gender": "What is the gender of the speaker?",
    "sound": "What is the sound?",
    "chain": "Please transcribe the following audio and then answer based on the audio's transcription.",
}
RELEASE_SYSTEM = ("You are a helpful language and speech assistant. You are able to understand the speech content that the user "
                  "provides, and assist the user with a variety of tasks using natural language.")


class PromptError(OneLine, ValueError):
    """A conversation that this tokenizer cannot express; one line."""


def messages_of(sample: dict, audio_token: str = "<audio_patch>") -> list[dict[str, str]]:
    """A packed sample's JSON as a chat: its own `messages`, or (audio +) prompt and response.

    The answer is `response`, else `label`; of `asr` the transcript, `text`, in place of a label, and of `sound` behind it. A
    sample without `duration` has no audio.
    Errors: PromptError where there is nothing to answer or to ask.
    """
    if sample.get("messages"):
        return [{"role": m["role"], "content": m["content"]} for m in sample["messages"]]
    task = sample.get("task") or "asr"
    keys = ("response", *{"asr": ("text",), "sound": ("label", "text")}.get(task, ("label",)))
    answer = next((sample[key] for key in keys if sample.get(key)), None)
    if answer is None:
        raise PromptError(f"sample of task {task} has no {' or '.join(keys)} to answer with")
    prompt = sample.get("prompt") or ""
    if sample.get("duration"):
        instruction = INSTRUCTIONS.get(task, "").replace("{lang}", sample.get("target_lang") or "English")
        prompt = f"{audio_token}\n{prompt or instruction}".rstrip("\n")
    elif not prompt:
        raise PromptError("sample has neither audio nor a prompt")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(answer)}]


def prompt_of(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat up to its last answer: what a model is to continue."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], style: str = "chat",
             audio_token: str = "<audio_patch>", system: str | None = None) -> tuple[list[int], list[int]]:
    """A chat as token ids and labels (-100 but on the assistants' words and their end of turn).

    system: the system turn of a chat that has none; None leaves it to the template.

    A chat that does not end with an assistant's turn ends with that turn's opening, ready to be continued; the ids are then a
    prefix of the ids with the answer. An audio stands where `audio_token` stands. Errors: PromptError.
    """
    if not messages:
        raise PromptError("the conversation is empty")
    for message in messages:
        if message["role"] == "assistant" and audio_token in message["content"]:
            raise PromptError(f"an assistant's turn holds {audio_token}")
    if style not in ("chat", "release"):
        raise PromptError(f"model.prompt is '{style}': chat or release")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    pieces = _template_pieces(tokenizer, messages) if style == "chat" else _release_pieces(tokenizer, messages, audio_token)
    ids = [i for piece, _ in pieces for i in piece]
    labels = [i if target else IGNORED for piece, target in pieces for i in piece]
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opening: bool) -> str:
    if not tokenizer.chat_template:
        raise PromptError("the tokenizer has no chat template: take an instruction-tuned LLM, or give its tokenizer one")
    try:
        # enable_thinking: Qwen 3's would otherwise put an empty block of thoughts into every answer, to be learnt and read out.
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening, date_string=_TEMPLATE_DATE,
                                             enable_thinking=False)
    except Exception as error:  # a template is a program: Gemma's, for one, refuses a system turn, others may do anything
        raise PromptError(f"the chat template refuses this conversation: {one_line(error)}") from None


def _template_pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
    """The rendered chat, cut where assistants begin and end and tokenised piece by piece: the ids that stand before an answer
    are the same whether the answer is being learnt or generated."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened, closed = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[:i + 1], False)
        if not (opened.startswith(done) and closed.startswith(opened)):
            raise PromptError("the chat template rewrites earlier turns when a later one is added: labels cannot be placed")
        turn = closed[len(opened):]
        words = turn.rstrip()  # the line break behind the end of turn is the template's, not the assistant's
        pieces += [(opened[len(done):], False), (words, True), (turn[len(words):], False)]
        done = closed
    whole = _render(tokenizer, messages, messages[-1]["role"] != "assistant")
    if not whole.startswith(done):
        raise PromptError("the chat template rewrites earlier turns when a later one is added: labels cannot be placed")
    pieces.append((whole[len(done):], False))
    return [(tokenizer.encode(text, add_special_tokens=False), target) for text, target in pieces if text]


def _release_pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], audio_token: str
                    ) -> list[tuple[list[int], bool]]:
    """The released weights' prompt: their system sentence, one line break behind each header, the audio on a line of its own
    before the instruction, every piece tokenised alone (so that a tokenizer which begins with BOS repeats it)."""
    known = tokenizer.get_vocab()
    needed = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    missing = [token for token in needed if token not in known]
    if missing:
        raise PromptError(f"model.prompt=release needs Llama 3's tokenizer: {', '.join(missing)} not in this one")
    begin, start, end, stop = (known[token] for token in needed)

    def words(text: str) -> list[int]:
        return tokenizer(text).input_ids

    def header(role: str) -> list[int]:
        return [start, *words(role), end]

    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": RELEASE_SYSTEM}, *messages]
    pieces: list[tuple[list[int], bool]] = [([begin], False)]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [(header(role) + words("\n"), False), (words(content) + [stop], True)]
        elif audio_token in content:
            if content.count(audio_token) > 1 or not content.startswith(audio_token):
                raise PromptError(f"model.prompt=release takes one {audio_token} at the beginning of a turn")
            instruction = content[len(audio_token):].lstrip("\n")
            asked = words(instruction) if instruction else []
            pieces.append((header(role) + words("\n" + audio_token) + asked + [stop], False))
        else:
            pieces.append((header(role) + words("\n") + words(content) + [stop], False))
    if messages[-1]["role"] != "assistant":
        pieces.append((header("assistant") + words("\n"), False))
    return pieces


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str = "chat") -> list[int]:
    """Token ids that end an answer: the last labelled one of a turn, and the tokenizer's end of sequence."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, labels = chat_ids(tokenizer, messages, style)
    last = [label for label in labels if label != IGNORED][-1]
    plain = set(tokenizer.encode("b", add_special_tokens=False))
    return sorted({last} - plain | ({tokenizer.eos_token_id} - {None}))


NORMALISATIONS = ("raw", "lower", "lower_no_punctuation")


def normalise(text: str, normalisation: str) -> str:
    """raw: as it is | lower | lower_no_punctuation: lower case, Unicode punctuation and symbols dropped but for apostrophes
    inside words; in both, white space runs become one space."""
    if normalisation not in NORMALISATIONS:
        raise PromptError(f"data.ctc_text is '{normalisation}': {' or '.join(NORMALISATIONS)}")
    if normalisation == "raw":
        return text
    text = text.lower()
    if normalisation == "lower_no_punctuation":
        text = text.replace("\u2019", "'")
        text = "".join(
            c if unicodedata.category(c)[0] not in "PS"
            or c == "'" and text[i - 1:i].isalnum() and text[i + 1:i + 2].isalnum() else " "
            for i, c in enumerate(text))
    return " ".join(text.split())


@lru_cache(maxsize=16)
def _spaced(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word has a form of its own behind a space, of one token, as in byte-level BPE."""
    bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
    return len(bare) == len(spaced) and bare != spaced


def ctc_target_ids(tokenizer: PreTrainedTokenizerBase, text: str, normalisation: str = "lower") -> list[int]:
    """A transcript as CTC targets. Words that look like special tokens are text here. Where the tokenizer tells words behind a
    space from words at the beginning, the first word takes the form that all others have: one target type a word."""
    text = normalise(text, normalisation).strip()
    if not text:
        return []
    return tokenizer.encode(" " + text if _spaced(tokenizer) else text, add_special_tokens=False, split_special_tokens=True)
