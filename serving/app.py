"""The routes: OpenAI's audio and chat endpoints, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from core.audio import SAMPLE_RATE
from core.request_body import AnswerThenRead
from core.spelling import join_words
from model.soundwave import Soundwave
from serving import formats, inputs
from serving.engine import Engine
from serving.guard import Guard
from serving.jobs import Answer, Inbox, Job
from serving.limits import Limits
from serving.metrics import Metrics
from serving.problems import Problem, invalid
from serving.recordings import Recording
from serving.streaming import late
from soundwave.recogniser import Options
from soundwave.vllm import VLLM
from soundwave.windows import Window

DECODING_THREADS = 8  # a recording that is being cut keeps one until its next pauses are found
FIELD_BYTES = 1 << 16  # of a form's field
WINDOWS_AHEAD = 8  # of one recording in the queue: others' requests are answered between them
LATE_SECONDS = 5.0  # after its deadline a request ends, whatever its job does
Events: TypeAlias = AsyncIterator[tuple[str, Any]]


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
        vllm: VLLM | None = None,
    ):
        self.model, self.name, self.limits = model, name, limits
        self.longest = model.config.encoder.max_seconds
        self.metrics = Metrics()
        self.engine = Engine(model, limits, self.metrics, batching, vllm)
        self.threads = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode")
        self.created = int(time.time())
        self.app = FastAPI(title="Soundwave", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self.app.add_middleware(Guard, limits=limits, metrics=self.metrics, token=token)
        self.app.add_middleware(AnswerThenRead)
        # Starlette's annotation asks for handlers of any exception; it calls one for its own class only.
        self.app.add_exception_handler(Problem, cast(Any, _problem))
        self.app.add_exception_handler(HTTPException, cast(Any, _http_problem))
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
        if self.engine.vllm is not None:
            await asyncio.to_thread(self.engine.vllm.close)
        self.threads.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Answer one second of silence: the first call pays for what is loaded and compiled once."""
        token = self.model.config.audio_token
        batch = self.model.prompts([inputs.audio_chat("transcribe", token)], [torch.zeros(16_000)])
        if self.model.llm is None or self.engine.vllm is not None:  # vLLM warms up by itself
            self.model.ctc_greedy(batch)
        else:
            self.model.generate(batch, max_new_tokens=2)

    # ---- routes ----

    async def health(self) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict:
        return {"object": "list", "data": [self._description()]}

    async def one_model(self, name: str) -> dict:
        inputs.check_model(name, self.name)
        return self._description()

    def _description(self) -> dict:
        """OpenAI's fields, and those that the web demo shows."""
        config = self.model.config
        own = {
            "stage": self.model.stage,
            "encoder": Path(config.encoder.name).name,
            "llm": Path(config.llm.name).name if self.model.llm is not None else None,
            "max_seconds": min(self.longest, self.limits.audio_seconds),
        }
        known = {"id": self.name, "object": "model", "created": self.created, "owned_by": "soundwave"}
        return known | own

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
        recording = Recording(self.engine.recogniser, file, self.limits.audio_seconds)
        # The first window is cut and queued before the status is sent: most refusals happen by then.
        transcript = Transcript(self, request, recording, form, deadline)
        await transcript.begin()
        if form.stream:
            return _stream(transcript.events(), _transcript_events)
        answer = await _whole(request, transcript.events())
        return formats.transcript(form, recording.seconds, answer)

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
        if "words" in wanted.include and len(clips) != 1:
            raise invalid(f"include: words needs one audio, not {len(clips)}", "include")
        job, inbox = self.job(
            request,
            turns,
            [clip.waveform for clip in clips],
            deadline,
            max_new_tokens=most,
            sampling=wanted.sampling,
            streams=wanted.stream,
            word_times="words" in wanted.include,
            with_frames="frames" in wanted.include,
        )
        self.engine.submit(job)
        self.metrics.audio_seconds.inc(sum(clip.seconds for clip in clips))
        completion = formats.Completion(request.state.request_id, self.name, wanted.include)
        events = self.events(request, job, inbox, self._warnings(clips))
        if wanted.stream:
            with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return _stream(events, lambda events: _chat_events(events, completion, with_usage))
        answer = await _whole(request, events)
        return JSONResponse(completion.whole(answer))

    # ---- jobs ----

    def _need_llm(self, what: str) -> None:
        if self.model.llm is None:
            raise invalid(
                f"this model is of stage 1 and has no LLM: it transcribes, {what} need a later stage"
            )

    async def _in_thread(self, function: Callable, *arguments: object):
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _warnings(self, clips: list[inputs.Clip]) -> list[str]:
        warnings = [text for clip in clips for text in clip.warnings]
        return warnings + [
            f"the audio {text}" for clip in clips if (text := self.model.length_warning(clip.seconds))
        ]

    def job(
        self, request: Request, turns: list[dict], waveforms: list[torch.Tensor], deadline: float, **more
    ) -> tuple[Job, Inbox]:
        """A job of a request, and where its events arrive. more: fields of Job."""
        more.setdefault("max_new_tokens", self.limits.new_tokens)
        positions = inputs.prompt_positions(self.model, turns, waveforms)
        inbox = Inbox()
        job = Job(
            turns,
            waveforms,
            positions,
            deadline=deadline,
            listener=inbox,
            request_id=request.state.request_id,
            **more,
        )
        return job, inbox

    async def events(self, request: Request, job: Job, inbox: Inbox, warnings: Sequence[str] = ()) -> Events:
        """A job's events: ("text", piece) ..., ("done", Answer). warnings: more of the answer's. Errors:
        Problem."""
        try:
            while True:
                left = job.deadline + LATE_SECONDS - time.monotonic()
                try:
                    kind, value = await asyncio.wait_for(inbox.events.get(), max(0.0, left))
                except TimeoutError:
                    raise late() from None
                if kind == "failed":
                    raise value
                if kind == "done":
                    log = request.state.log
                    log["tokens"] = log.get("tokens", 0) + len(value.tokens)
                    log.setdefault("queue_seconds", round(job.started - job.queued, 4))
                    value.warnings = [*warnings, *value.warnings]
                yield kind, value
                if kind == "done":
                    return
        finally:
            job.cancelled = True


class Transcript:
    """The windows of a recording as jobs, a few at a time, and their answers as one, in order."""

    def __init__(
        self, server: Server, request: Request, recording: Recording, form: inputs.AudioForm, deadline: float
    ):
        self.server, self.request, self.recording = server, request, recording
        self.form, self.deadline = form, deadline
        self.windows = recording.windows()
        self.pending: deque[tuple[Window, Job, Inbox]] = deque()
        self.is_cut = False

    async def begin(self) -> None:
        """Errors: Problem for a recording that cannot be read, and where the queue is full."""
        await self._add(admitted=False)

    async def _add(self, admitted: bool = True) -> None:
        """Queue the next window."""
        window = await self.server._in_thread(next, self.windows, None)
        if window is None:
            self.is_cut = True
            return
        server, form = self.server, self.form
        job, inbox = server.job(
            self.request,
            inputs.audio_chat(form.task, server.model.config.audio_token),
            [torch.from_numpy(window.samples)],
            self.deadline,
            max_new_tokens=min(server.limits.new_tokens, Options.max_new_tokens),
            sampling=form.sampling,
            streams=form.stream,
            is_transcript=True,
            gated=True,
            word_times=form.times,
            with_frames=form.frames,
            language="en" if form.task == "translate" else form.language,
            window=window,
        )
        server.engine.submit(job, admitted)
        server.metrics.audio_seconds.inc(window.seconds)
        self.pending.append((window, job, inbox))

    async def events(self) -> Events:
        whole, texts = Answer(""), []
        try:
            while True:
                while not self.is_cut and len(self.pending) < WINDOWS_AHEAD:
                    await self._add()
                if not self.pending:
                    break
                window, job, inbox = self.pending[0]
                streamed = ""
                async for kind, value in self.server.events(self.request, job, inbox):
                    if kind == "text":
                        joined = join_words([whole.text, value]) if whole.text and not streamed else value
                        yield "text", joined.removeprefix(whole.text) if not streamed else value
                        streamed += value
                        continue
                    shift = window.frames_origin / SAMPLE_RATE
                    whole.words += [
                        replace(word, start=word.start + shift, end=word.end + shift) for word in value.words
                    ]
                    whole.frames += value.frames
                    texts += [value.text] if value.text else []
                    whole.text = join_words(texts)
                    whole.tokens += value.tokens
                    whole.warnings += [one for one in value.warnings if one not in whole.warnings]
                    whole.finish = "length" if "length" in (whole.finish, value.finish) else "stop"
                self.pending.popleft()
            self.request.state.log["audio_seconds"] = round(self.recording.seconds, 3)
            whole.warnings = self.recording.notes + whole.warnings
            yield "done", whole
        finally:
            for _, job, _ in self.pending:
                job.cancelled = True


async def _whole(request: Request, events: Events) -> Answer:
    """Return the last event's answer; end the events where the client leaves. Errors: Problem."""

    async def last() -> Answer:
        async for kind, value in events:
            if kind == "done":
                return value
        raise late()

    answering, leaving = asyncio.create_task(last()), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Problem(499, "the client has left")
        return answering.result()
    finally:
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            await asyncio.wait({answering})


def _stream(events: Events, shown: Callable[[Events], AsyncIterator[str]]) -> Response:
    return StreamingResponse(
        _with_problems(shown(events)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


async def _with_problems(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A problem after the first byte is an event of its own, and the last."""
    try:
        async for event in events:
            yield event
    except Problem as problem:
        yield formats.event(problem.body())


async def _transcript_events(events: Events) -> AsyncIterator[str]:
    async for kind, value in events:
        if kind == "text":
            yield formats.event({"type": "transcript.text.delta", "delta": value})
        elif kind == "done":
            yield formats.event({"type": "transcript.text.done", "text": value.text})
            yield formats.event("[DONE]")


async def _chat_events(
    events: Events, completion: formats.Completion, with_usage: bool
) -> AsyncIterator[str]:
    yield formats.event(completion.chunk({"role": "assistant", "content": ""}))
    async for kind, value in events:
        if kind == "text":
            yield formats.event(completion.chunk({"content": value}))
        elif kind == "done":
            yield formats.event(completion.last_chunk(value))
            if with_usage:
                yield formats.event(completion.usage_chunk(value))
            yield formats.event("[DONE]")


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


async def _problem(request: Request, problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, problem.headers())


async def _http_problem(request: Request, error: HTTPException) -> Response:
    what = {404: "there is no such route", 405: "this route has another method"}
    problem = Problem(error.status_code, what.get(error.status_code, "the request is not valid"))
    return JSONResponse(problem.body(), error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(Problem(500, "the request could not be answered", code="internal_error").body(), 500)
