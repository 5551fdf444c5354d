"""Requests to what the engine needs: form fields and JSON to chats, files and base64 to waveforms.

Everything here runs before a request may wait for the model, so that what cannot be answered costs little.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.audio import SAMPLE_RATE, AudioError, decode, largest_decoded
from core.languages import is_known, language_code
from core.samples import INSTRUCTIONS, PromptError, asked
from model.prompt import chat_ids
from model.soundwave import Soundwave
from serving.limits import Limits
from serving.problems import Problem, invalid
from soundwave.vllm import Sampling

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
TASKS = {"transcribe": INSTRUCTIONS["asr"], "translate": INSTRUCTIONS["translation"].format(lang="English")}


class Clip(NamedTuple):
    waveform: torch.Tensor  # [S] at 16 kHz
    warnings: list[str]

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


def clip_of(data: bytes, limits: Limits, longest: float, param: str) -> Clip:
    """Decode an uploaded file. longest: seconds that it may have. Errors: Problem."""
    longest = min(longest, limits.audio_seconds)
    if not data:
        raise invalid("the audio is empty", param)
    try:
        audio = decode(data, whole=False, max_seconds=longest, max_bytes=largest_decoded(longest))
    except AudioError as error:
        if error.reason in ("too_long", "too_large"):
            raise invalid(
                f"the audio is too long: {longest:g} s at most here", param, "audio_too_long"
            ) from None
        raise invalid(f"the audio cannot be decoded: {error}", param, "invalid_audio") from None
    return Clip(torch.from_numpy(audio.samples), [one.detail for one in audio.findings])


class AudioForm(NamedTuple):
    """The fields of /v1/audio/transcriptions and translations, beside the file."""

    task: str  # transcribe | translate
    format: str
    granularities: tuple[str, ...]
    language: str | None
    sampling: Sampling
    stream: bool
    frames: bool  # an extension (serving/frames.py)

    @property
    def times(self) -> bool:
        return self.format in ("srt", "vtt", "verbose_json")


def audio_form(fields: Mapping[str, list[str]], task: str, model_name: str) -> AudioForm:
    """fields: name -> values. Errors: Problem for a field that is unknown or has a value that is not."""

    def one(name: str, default: str | None = None) -> str | None:
        values = fields.get(name, [])
        if len(values) > 1:
            raise invalid(f"{name} is given {len(values)} times", name)
        return values[0] if values and values[0] != "" else default

    check_model(one("model"), model_name)
    known = {"model", "response_format", "temperature", "prompt"}
    if task == "transcribe":
        known |= {"language", "stream", "timestamp_granularities[]", "timestamp_granularities", "include[]"}
    if unknown := sorted(set(fields) - known - {"file"}):
        raise invalid(f"{unknown[0]} is not supported", unknown[0], "unsupported_parameter")
    if one("prompt"):
        raise invalid(
            "prompt is not supported here: ask about audio with /v1/chat/completions",
            "prompt",
            "unsupported_parameter",
        )
    format = one("response_format", "json")
    if format not in FORMATS:
        raise invalid(f"response_format is one of {', '.join(FORMATS)}", "response_format")
    granularities = tuple(
        fields.get("timestamp_granularities[]", []) + fields.get("timestamp_granularities", [])
    )
    if wrong := [value for value in granularities if value not in ("word", "segment")]:
        raise invalid(
            f"timestamp_granularities is word, segment or both, not {wrong[0]!r:.40}",
            "timestamp_granularities",
        )
    if granularities and format != "verbose_json":
        raise invalid("timestamp_granularities needs response_format=verbose_json", "timestamp_granularities")
    include = fields.get("include[]", [])
    if wrong := [value for value in include if value != "frames"]:
        raise invalid(f"include is frames, not {wrong[0]!r:.40}", "include")
    if include and format != "verbose_json":
        raise invalid("include needs response_format=verbose_json", "include")
    language = one("language")
    if language is not None and not is_known(language):
        raise invalid(f"language {language!r:.40} is not known: give a code, as en", "language")
    stream = (one("stream") or "false").lower()
    if stream not in ("true", "false", "1", "0"):
        raise invalid("stream is true or false", "stream")
    if (streams := stream in ("true", "1")) and format not in ("json", "text"):
        raise invalid(f"response_format={format} cannot be streamed: json or text can", "stream")
    return AudioForm(
        task,
        format,
        granularities or ("segment",),
        language_code(language),
        Sampling(number(one("temperature"), "temperature", 2.0)),
        streams,
        bool(include),
    )


def number(text: str | None, name: str, most: float) -> float:
    """A field's value from 0 to `most`; 0 where it is not given. Errors: Problem."""
    try:
        value = float(text or 0.0)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= most:
        raise invalid(f"{name} is a number from 0 to {most:g}", name)
    return value


def check_model(asked_for: str | None, name: str) -> None:
    if asked_for is None:
        raise invalid("model is missing", "model")
    if asked_for != name:
        raise Problem(
            404,
            f"there is no model {asked_for!r:.80} here: GET /v1/models names the one that is served",
            param="model",
            code="model_not_found",
        )


# ---- chats ----


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InputAudio(_Part):
    data: str
    format: str = "wav"  # what the audio is, is found by its content


class AudioPart(_Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


class TextPart(_Part):
    type: Literal["text"]
    text: str


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Part):
    type: Literal["text"]


class ChatRequest(_Part):
    """The body of /v1/chat/completions. A parameter that the model cannot follow is refused unless its value
    asks for nothing."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    include: list[
        Literal["frames", "words"]
    ] = []  # an extension: serving/frames.py; times of the answer's words
    # With these values they ask for nothing.
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    logprobs: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def sampling(self) -> Sampling:
        temperature = self.temperature or 0.0
        return Sampling(temperature, self.top_p or 1.0) if temperature else Sampling()


def chat_request(body: bytes) -> ChatRequest:
    """Errors: Problem."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        first = max(problems, key=lambda one: len(one["loc"]))  # of a union, the branch that was meant
        where = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise invalid(f"{where} is not supported", where, "unsupported_parameter") from None
        raise invalid(f"{where or 'the body'}: {first['msg']}"[:300], where or None) from None


def _path(location: tuple[int | str, ...]) -> str:
    """Return pydantic's place of an error as a path, without the names of a union's branches."""
    path: list[str] = []
    for before, part in zip((None, *location), location, strict=False):
        is_tag = isinstance(before, int) and part in ("text", "input_audio")
        if isinstance(part, int) or not is_tag and part != "str" and re.fullmatch("[a-z_]+", part):
            path.append(str(part))
    return ".".join(path)


class Chat(NamedTuple):
    turns: list[dict]
    clips: list[Clip]


def chat_of(request: ChatRequest, limits: Limits, longest: float, audio_token: str) -> Chat:
    """Return the chat as turns of core.samples.messages_of, and its audio, in order. longest: seconds that
    one audio may have. Errors: Problem."""
    turns: list[dict[str, Any]] = []
    clips: list[Clip] = []
    characters, seconds = 0, 0.0
    for index, message in enumerate(request.messages):
        where = f"messages.{index}.content"
        parts = message.content
        parts = [TextPart(type="text", text=parts)] if isinstance(parts, str) else parts
        lines, audios = [], 0
        for part in parts:
            if isinstance(part, TextPart):
                characters += len(part.text)
                if characters > limits.question_characters:
                    raise invalid(f"the chat has more than {limits.question_characters:,} characters", where)
                lines.append(part.text)
                continue
            if message.role != "user":
                raise invalid("only a user's message may hold audio", where)
            if "\n".join(lines).count(audio_token) > audios:
                # A turn's audios are its first audio tokens (core.samples.messages_of).
                raise invalid(f"text before audio may not hold {audio_token}", where)
            if len(clips) == limits.audios:
                raise invalid(f"a chat may hold {limits.audios} audios", where)
            clips.append(clip_of(_decoded(part.input_audio.data, where), limits, longest, where))
            seconds += clips[-1].seconds
            if seconds > limits.audio_seconds:
                raise invalid(f"the audio of a chat may last {limits.audio_seconds:g} s", where)
            lines.append(audio_token)
            audios += 1
        content = "\n".join(lines)
        turn: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": content,
        }
        if audio_token in content:
            turn["audios"] = audios
        turns.append(turn)
    if turns[-1]["role"] != "user":
        raise invalid("the last message is the user's", "messages")
    return Chat(turns, clips)


def _decoded(data: str, where: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("input_audio.data is not base64", where) from None


def audio_chat(task: str, audio_token: str) -> list[dict]:
    return [asked(TASKS[task], audio_token)]


def prompt_positions(model: Soundwave, turns: list[dict], clips: list[torch.Tensor]) -> int:
    """Return how many positions of the LLM a prompt takes at most: its text, and every frame of the alignment
    adapter (how many of these are kept is known later). Errors: Problem."""
    config = model.config
    try:
        ids, _ = chat_ids(model.tokenizer, turns, config.prompt, config.audio_token, config.system_prompt)
    except PromptError as error:
        raise invalid(str(error), "messages") from None
    rate = (model.encoder.frame_rate if model.encoder is not None else 50.0) / config.alignment.stack_frames
    padded = config.encoder.pad_to_seconds if config.alignment.ctc_length == "full" else None
    frames = 0
    for clip in clips:
        seconds = len(clip) / SAMPLE_RATE
        if padded:
            seconds = padded * max(1, math.ceil(seconds / padded))
        frames += math.ceil(seconds * rate) + 2  # windows and the stack round up
    return len(ids) - len(clips) + frames
