"""Answers in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse, PlainTextResponse

from serving.jobs import Answer


@dataclass
class Segment:
    start: float
    end: float
    text: str
    tokens: list[int] = field(default_factory=list)
    words: list = field(default_factory=list)


def event(data: dict | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def with_warnings(body: dict, warnings: list[str]) -> dict:
    return body | {"warnings": warnings} if warnings else body


class Completion:
    """The objects of one chat completion."""

    def __init__(self, request_id: str, model: str):
        self.common = {
            "id": f"chatcmpl-{request_id.removeprefix('req_')}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish,
            "logprobs": None,
        }
        body = {"object": "chat.completion", **self.common, "choices": [choice], "usage": usage(answer)}
        return with_warnings(body, answer.warnings)

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {"object": "chat.completion.chunk", **self.common, "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict:
        return {"object": "chat.completion.chunk", **self.common, "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.tokens)}
    return counts | {"total_tokens": sum(counts.values())}


def transcript(form, seconds: float, answer: Answer):
    """The response of a transcription or translation; segments: those of the whole clip."""
    text = answer.text.strip()
    if form.format == "text":
        return PlainTextResponse(text + "\n")
    if form.format == "json":
        usage_ = {"type": "duration", "seconds": round(seconds, 3)}
        return JSONResponse(with_warnings({"text": text, "usage": usage_}, answer.warnings))
    raise NotImplementedError
