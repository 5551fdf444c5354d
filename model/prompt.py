"""Text in and out of the tokenizer: chats to token ids with labels, samples to chats, transcripts to CTC
targets."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from core.console import one_line
from core.control_tokens import (
    control_tokens,
    cuts_at_borders,
    cuts_everywhere,
    cuts_inside,
    encode_pieces,
    marked,
    text_ids,
    unused_mark,
)
from core.samples import AUDIO_TOKEN, INSTRUCTIONS, PromptError, asked, check_role, messages_of, prompt_of

__all__ = [
    "AUDIO_TOKEN",
    "INSTRUCTIONS",
    "PromptError",
    "asked",
    "audio_count",
    "chat_ids",
    "messages_of",
    "prompt_of",
    "stop_ids",
]

IGNORED = -100
# Llama 3.x templates print a date, by default today's: a training prompt must not depend on the day.
_TEMPLATE_DATE = "26 Jul 2024"

RELEASE_SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the "
    "user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    style: str = "chat",
    audio_token: str = AUDIO_TOKEN,
    system: str | None = None,
) -> tuple[list[int], list[int]]:
    """Return a chat as token ids and labels (-100 but on the assistants' words and their end of turn).

    messages: turns as of `core.samples.messages_of`. An audio stands where `audio_token` does; all else that
    a turn holds is text, and the only control tokens are those that the template writes. system: the system
    turn of a chat that has none; None leaves it to the template.

    A chat that does not end with an assistant's turn ends with that turn's opening, ready to be continued;
    the ids are then a prefix of the ids with the answer. Errors: PromptError.
    """
    if not messages:
        raise PromptError("the conversation is empty")
    if style not in ("chat", "release"):
        raise PromptError(f"model.prompt is '{style}': chat or release")
    for number, message in enumerate(messages, 1):
        check_role(number, message.get("role"))
        if not isinstance(message.get("content"), str):
            raise PromptError(f"turn {number} holds no text")
        if message["role"] == "assistant" and _audios_of(message, audio_token):
            raise PromptError(f"an assistant's turn holds {audio_token}")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system, "audios": 0}, *messages]
    tokenised = _chat_pieces if style == "chat" else _release_pieces
    pieces = tokenised(tokenizer, messages, audio_token)
    ids = [i for piece, _ in pieces for i in piece]
    labels = [i if target else IGNORED for piece, target in pieces for i in piece]
    return ids, labels


def _audios_of(message: dict, audio_token: str) -> int:
    return message.get("audios", message["content"].count(audio_token))


def audio_count(messages: list[dict], audio_token: str = AUDIO_TOKEN) -> int:
    """Return how many audios a chat has a place for."""
    return sum(_audios_of(message, audio_token) for message in messages)


Pieces = list[tuple[list[int], bool]]  # (ids, whether they are to be predicted)


def _chat_pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict], audio_token: str) -> Pieces:
    """Tokenise a chat through the template, with what the turns hold as text.

    Names of control tokens in the turns are cut (core/control_tokens.py) before the template is rendered.
    Whether that sufficed is seen by the control tokens of the result: they must be those of the same chat
    with every turn cut into characters. Templates that read what an assistant wrote (and take thoughts out of
    earlier turns) see its markup, where that holds as well.
    """
    controls = control_tokens(tokenizer)
    texts = [message["content"].split(audio_token, _audios_of(message, audio_token)) for message in messages]
    threatened = [any(controls.threaten(tokenizer, part) for part in parts) for parts in texts]
    mark = unused_mark(part for parts in texts for part in parts)

    def tokenised(cuts_of: Callable[[str, str], set[int]]) -> Pieces:
        turns = [
            {
                "role": message["role"],
                "content": audio_token.join(
                    marked(part, cuts_of(message["role"], part), mark) if cut else part for part in parts
                ),
            }
            for message, parts, cut in zip(messages, texts, threatened, strict=True)
        ]
        return [
            (encode_pieces(tokenizer, text, mark), target)
            for text, target in _template_pieces(tokenizer, turns)
        ]

    def inside(role: str, text: str) -> set[int]:
        cuts = cuts_inside(text, controls.begins)
        left = controls.rewrites and controls.within(encode_pieces(tokenizer, marked(text, cuts, mark), mark))
        return cuts_everywhere(text) if left else cuts

    def readable(role: str, text: str) -> set[int]:
        return cuts_inside(text, controls.special) if role == "assistant" else inside(role, text)

    def at_borders(role: str, text: str) -> set[int]:
        return inside(role, text) | cuts_at_borders(text, controls)

    if not any(threatened):
        return tokenised(inside)
    strict = tokenised(lambda role, text: cuts_everywhere(text) | cuts_at_borders(text, controls))
    expected = controls.within(i for ids, _ in strict for i in ids)
    for cuts_of in (readable, inside, at_borders):
        try:
            pieces = tokenised(cuts_of)
        except PromptError:  # a template that lost its way in the assistant's markup
            continue
        if controls.within(i for ids, _ in pieces for i in ids) == expected:
            return pieces
    return strict


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opening: bool) -> str:
    if not tokenizer.chat_template:
        raise PromptError(
            "the tokenizer has no chat template: take an instruction-tuned LLM, or give its tokenizer one"
        )
    try:
        # enable_thinking: Qwen 3's would otherwise put an empty block of thoughts into every answer, to be
        # learnt and decoded.
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=opening,
            date_string=_TEMPLATE_DATE,
            enable_thinking=False,
        )
    except (
        Exception
    ) as error:  # a template is a program: Gemma's, for one, refuses a system turn, others may do anything
        raise PromptError(f"the chat template refuses this conversation: {one_line(error)}") from None
    return str(rendered)  # with tokenize=False it is a string


def _template_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[tuple[str, bool]]:
    """Return the rendered chat, cut where assistants begin and end, to be tokenised piece by piece: the ids
    that stand before an answer are the same whether the answer is being learnt or generated."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened, closed = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
        if not (opened.startswith(done) and closed.startswith(opened)):
            raise PromptError(
                "the chat template rewrites earlier turns when a later one is added: labels cannot be placed"
            )
        turn = closed[len(opened) :]
        words = turn.rstrip()  # the line break behind the end of turn is the template's, not the assistant's
        pieces += [(opened[len(done) :], False), (words, True), (turn[len(words) :], False)]
        done = closed
    whole = _render(tokenizer, messages, messages[-1]["role"] != "assistant")
    if not whole.startswith(done):
        raise PromptError(
            "the chat template rewrites earlier turns when a later one is added: labels cannot be placed"
        )
    pieces.append((whole[len(done) :], False))
    return [(text, target) for text, target in pieces if text]


def _release_pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict], audio_token: str) -> Pieces:
    """The official checkpoint's prompt: its system sentence, one line break after a header, the audio on a
    line of its own before the instruction, every piece tokenised alone (so that a tokenizer which begins with
    BOS repeats it)."""
    vocabulary = tokenizer.get_vocab()
    needed = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise PromptError(
            f"model.prompt=release needs Llama 3's tokenizer: {', '.join(missing)} not in this one"
        )
    begin, start, end, stop = (vocabulary[token] for token in needed)

    def words(text: str) -> list[int]:
        return text_ids(tokenizer, text, add_special_tokens=True)

    def header(role: str) -> list[int]:
        return [start, *words(role), end]

    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": RELEASE_SYSTEM}, *messages]
    pieces: Pieces = [([begin], False)]
    for message in messages:
        role, content, audios = message["role"], message["content"], _audios_of(message, audio_token)
        if role == "assistant":
            pieces += [(header(role) + words("\n"), False), (words(content) + [stop], True)]
        elif audios:
            if audios > 1 or not content.startswith(audio_token):
                raise PromptError(f"model.prompt=release takes one {audio_token} at the beginning of a turn")
            instruction = content[len(audio_token) :].lstrip("\n")
            question = words(instruction) if instruction else []
            audio = tokenizer.encode("\n" + audio_token)
            pieces.append((header(role) + audio + question + [stop], False))
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
