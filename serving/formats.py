"""Answers in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Collection

from fastapi.responses import JSONResponse, PlainTextResponse, Response

from core.languages import UNDETERMINED
from core.subtitles import cues, write
from serving.frames import word_rows
from serving.inputs import AudioForm
from serving.jobs import Answer


def event(data: dict | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def with_warnings(body: dict, warnings: list[str]) -> dict:
    return body | {"warnings": warnings} if warnings else body


class Completion:
    """The objects of one chat completion."""

    def __init__(self, request_id: str, model: str, include: Collection[str] = ()):
        self.include = include
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
        return with_warnings(body | self.included(answer), answer.warnings)

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {"object": "chat.completion.chunk", **self.common, "choices": [choice]}

    def last_chunk(self, answer: Answer) -> dict:
        return with_warnings(self.chunk({}, answer.finish) | self.included(answer), answer.warnings)

    def included(self, answer: Answer) -> dict:
        values = {"frames": answer.frames, "words": word_rows(answer.words)}
        return {name: value for name, value in values.items() if name in self.include}

    def usage_chunk(self, answer: Answer) -> dict:
        return {"object": "chat.completion.chunk", **self.common, "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.tokens)}
    return counts | {"total_tokens": sum(counts.values())}


def transcript(form: AudioForm, seconds: float, answer: Answer) -> Response:
    """The response of a transcription or translation of a clip."""
    text = answer.text.strip()
    if form.format == "text":
        return PlainTextResponse(text + "\n")
    length = {"type": "duration", "seconds": round(seconds, 3)}
    if form.format == "json":
        return JSONResponse(with_warnings({"text": text, "usage": length}, answer.warnings))
    segments = cues(answer.words)
    if form.format in ("srt", "vtt"):
        media = "text/vtt" if form.format == "vtt" else "application/x-subrip"
        return PlainTextResponse(write(segments, form.format), media_type=media)
    body = {
        "task": form.task,
        "language": "en" if form.task == "translate" else form.language or UNDETERMINED,
        "duration": round(seconds, 3),
        "text": text,
        "usage": length,
    }
    if "segment" in form.granularities:
        body["segments"] = [
            {
                "id": number,
                "seek": 0,
                "start": round(segment.begins, 3),
                "end": round(segment.ends, 3),
                "text": segment.line,
                "temperature": form.sampling.temperature,
                "confidence": round(sum(w.confidence for w in segment.words) / len(segment.words), 4),
            }
            for number, segment in enumerate(segments)
        ]
    if "word" in form.granularities:
        body["words"] = word_rows(answer.words)
    if form.frames:
        body["frames"] = answer.frames
    return JSONResponse(with_warnings(body, answer.warnings))
