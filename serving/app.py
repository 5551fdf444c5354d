"""The routes: OpenAI's audio and chat endpoints, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from model.soundwave import Soundwave
from serving import formats, inputs
from serving.engine import Engine
from serving.guard import Guard
from serving.jobs import Answer, Inbox, Job
from serving.limits import Limits
from serving.metrics import Metrics
from serving.problems import Problem, invalid
from serving.streaming import late

DECODING_THREADS = 2
FIELD_BYTES = 1 << 16  # of a form's field


class Server:
    """One model behind the routes. longest: seconds of one clip, by the model's folder."""

    def __init__(
        self,
        model: Soundwave,
        name: str,
        limits: Limits,
        *,
        token: str | None = None,
        batching: bool = True,
    ):
        self.model, self.name, self.limits = model, name, limits
        self.longest = model.config.encoder.max_seconds
        self.metrics = Metrics()
        self.engine = Engine(model, limits, self.metrics, batching)
        self.threads = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode")
        self.created = int(time.time())
        self.app = FastAPI(title="Soundwave", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self.app.add_middleware(Guard, limits=limits, metrics=self.metrics, token=token)
        self.app.add_exception_handler(Problem, _problem)
        self.app.add_exception_handler(HTTPException, _http_problem)
        self.app.add_exception_handler(Exception, _failure)
        get, post = self.app.get, self.app.post
        get("/health")(self.health)
        get("/metrics")(self.show_metrics)
        get("/v1/models")(self.models)
        get("/v1/models/{name:path}")(self.one_model)
        post("/v1/audio/transcriptions")(self.transcriptions)
        post("/v1/audio/translations")(self.translations)
        post("/v1/chat/completions")(self.chat)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI):
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.close, 30.0)
        self.threads.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Answer one second of silence: the first call pays for what is loaded and compiled once."""
        token = self.model.config.audio_token
        batch = self.model.prompts([inputs.audio_chat("transcribe", token)], [torch.zeros(16_000)])
        if self.model.llm is None:
            self.model.ctc_greedy(batch)
        else:
            self.model.generate(batch, max_new_tokens=2)

    # ---- routes ----

    async def health(self) -> Response:
        alive = self.engine.thread.is_alive() and not self.engine.closed
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict:
        return {"object": "list", "data": [self._description()]}

    async def one_model(self, name: str) -> dict:
        inputs.check_model(name, self.name)
        return self._description()

    def _description(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "soundwave"}

    async def transcriptions(self, request: Request) -> Response:
        return await self._audio(request, "transcribe")

    async def translations(self, request: Request) -> Response:
        return await self._audio(request, "translate")

    async def _audio(self, request: Request, task: str) -> Response:
        deadline = time.monotonic() + self.limits.request_seconds
        fields, file = await read_form(request)
        form = inputs.audio_form(fields, task, self.name)
        if task == "translate":
            self._need_llm("translations")
        if file is None:
            raise invalid("file is missing", "file")
        clip = await self._in_thread(inputs.clip_of, file, self.limits, self.longest, "file")
        request.state.log["audio_seconds"] = round(clip.seconds, 3)
        inbox, job = self._job(
            request, inputs.audio_chat(task, self.model.config.audio_token), [clip], form, deadline
        )
        if form.stream:
            return self._stream(request, inbox, [job], _transcript_events)
        answer = await self._answer(request, inbox, job)
        answer.warnings = self._warnings([clip]) + answer.warnings
        return formats.transcript(form, clip.seconds, answer)

    async def chat(self, request: Request) -> Response:
        deadline = time.monotonic() + self.limits.request_seconds
        self._need_llm("chat completions")
        body = await request.body()
        wanted = inputs.chat_request(body)
        inputs.check_model(wanted.model, self.name)
        token = self.model.config.audio_token
        turns, clips = await self._in_thread(inputs.chat_of, wanted, self.limits, self.longest, token)
        request.state.log["audio_seconds"] = round(sum(clip.seconds for clip in clips), 3)
        most = wanted.max_completion_tokens or wanted.max_tokens or self.limits.new_tokens
        if most > self.limits.new_tokens:
            raise invalid(f"an answer has {self.limits.new_tokens} tokens at most here", "max_tokens")
        inbox, job = self._job(request, turns, clips, wanted, deadline, most)
        completion = formats.Completion(request.state.request_id, self.name)
        if wanted.stream:
            with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return self._stream(
                request, inbox, [job], lambda events: _chat_events(events, completion, with_usage)
            )
        answer = await self._answer(request, inbox, job)
        answer.warnings = self._warnings(clips)
        return JSONResponse(completion.whole(answer))

    # ---- jobs ----

    def _need_llm(self, what: str) -> None:
        if self.model.llm is None:
            raise invalid(
                f"this model is of stage I and has no LLM: it transcribes, {what} need a later stage"
            )

    async def _in_thread(self, function: Callable, *arguments: object):
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _warnings(self, clips: list[inputs.Clip]) -> list[str]:
        found = [text for clip in clips for text in clip.warnings]
        return found + [
            f"the audio {text}" for clip in clips if (text := self.model.length_warning(clip.seconds))
        ]

    def _job(self, request, turns, clips, wanted, deadline: float, most: int | None = None):
        waveforms = [clip.waveform for clip in clips]
        most = most or self.limits.new_tokens
        positions = inputs.prompt_positions(self.model, turns, waveforms)
        inbox = Inbox()
        job = Job(
            turns,
            waveforms,
            positions,
            most,
            deadline,
            inbox,
            sampling=wanted.sampling,
            streams=wanted.stream,
            word_times=getattr(wanted, "times", False),
            language=getattr(wanted, "language", None),
            request_id=request.state.request_id,
        )
        self.engine.submit([job])
        self.metrics.audio_seconds.inc(sum(clip.seconds for clip in clips))
        return inbox, job

    async def _answer(self, request: Request, inbox: Inbox, job: Job) -> Answer:
        """Wait for a job's whole answer; cancel it where the client leaves. Errors: Problem."""
        leaving = asyncio.create_task(_left(request))
        try:
            while True:
                event = asyncio.create_task(inbox.events.get())
                left = job.deadline + 5.0 - time.monotonic()
                await asyncio.wait({event, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise late()
                kind, value = event.result()
                if kind == "failed":
                    raise value
                if kind == "done":
                    _log(request, job, value)
                    return value
        finally:
            job.cancelled = True
            leaving.cancel()

    def _stream(self, request: Request, inbox: Inbox, jobs: list[Job], shown) -> Response:
        async def events() -> AsyncIterator[tuple[str, object]]:
            try:
                while True:
                    left = jobs[0].deadline + 5.0 - time.monotonic()
                    try:
                        kind, value = await asyncio.wait_for(inbox.events.get(), max(0.0, left))
                    except TimeoutError:
                        kind, value = "failed", late()
                    if kind == "done":
                        _log(request, jobs[0], value)
                    yield kind, value
                    if kind in ("done", "failed"):
                        return
            finally:
                for job in jobs:
                    job.cancelled = True

        return StreamingResponse(
            shown(events()), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )


async def _transcript_events(events: AsyncIterator[tuple[str, object]]) -> AsyncIterator[str]:
    async for kind, value in events:
        if kind == "text":
            yield formats.event({"type": "transcript.text.delta", "delta": value})
        elif kind == "done":
            yield formats.event({"type": "transcript.text.done", "text": value.text})
            yield formats.event("[DONE]")
        else:
            yield formats.event(value.body())


async def _chat_events(
    events: AsyncIterator[tuple[str, object]], completion: formats.Completion, with_usage: bool
) -> AsyncIterator[str]:
    yield formats.event(completion.chunk({"role": "assistant", "content": ""}))
    async for kind, value in events:
        if kind == "text":
            yield formats.event(completion.chunk({"content": value}))
        elif kind == "done":
            yield formats.event(completion.chunk({}, value.finish))
            if with_usage:
                yield formats.event(completion.usage_chunk(value))
            yield formats.event("[DONE]")
        else:
            yield formats.event(value.body())


async def read_form(request: Request) -> tuple[dict[str, list[str]], bytes | None]:
    """Return the fields of a multipart form and its file. Errors: Problem."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise invalid("send multipart/form-data with the fields file and model")
    try:
        async with request.form(max_files=1, max_fields=32, max_part_size=FIELD_BYTES) as form:
            fields: dict[str, list[str]] = {}
            file = None
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "file":
                        raise invalid(f"{name:.40} is not supported", name[:40], "unsupported_parameter")
                    file = await value.read()
                else:
                    fields.setdefault(name, []).append(value)
    except (MultiPartException, HTTPException) as error:
        reason = getattr(error, "message", None) or getattr(error, "detail", "")
        raise invalid(f"the form cannot be read: {reason}"[:200]) from None
    if file is None and "file" in fields:
        raise invalid("file is a text field: send it as a file, with a file name", "file")
    return fields, file


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _log(request: Request, job: Job, answer: Answer) -> None:
    request.state.log["tokens"] = len(answer.tokens)
    request.state.log["queue_seconds"] = round(job.started - job.queued, 4)


async def _problem(request: Request, problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, problem.headers())


async def _http_problem(request: Request, error: HTTPException) -> Response:
    what = {404: "there is no such route", 405: "this route has another method"}
    problem = Problem(error.status_code, what.get(error.status_code, "the request is not valid"))
    return JSONResponse(problem.body(), error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(Problem(500, "the request could not be answered", code="internal_error").body(), 500)
