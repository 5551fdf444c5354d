"""The queue in front of the model: jobs are grouped into batches, which one thread answers.

A batch starts with the job that has waited longest. Others join it in the order of their arrival while the
padded audio, the padded tokens and the rows stay within the limits. Each job is answered as soon as its own
row ends. A batch that fails is repeated job by job, so that one job cannot fail the others.

With vLLM (soundwave/vllm.py) this thread encodes and compresses the audio of a batch and sends each row's
embeddings on; vLLM batches the rows continuously, and their tokens come back as calls into this thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from core.audio import SAMPLE_RATE
from core.spelling import spell
from model.batch import Batch
from model.generation.timestamps import align_frames
from model.language_model import base_of, context_length, end_ids
from model.soundwave import Audio, Soundwave
from model.waveforms import SoundWarning
from serving.frames import frames_of
from serving.jobs import Answer, Job
from serving.limits import Limits
from serving.metrics import Metrics
from serving.problems import Problem
from serving.recordings import Recogniser
from serving.streaming import AllAnswered, RowStreamer, late
from soundwave.decoding import ctc_frames
from soundwave.vllm import VLLM

logger = logging.getLogger("soundwave.serving")
Result = TypeVar("Result")


class Engine:
    """One model, one worker thread."""

    def __init__(
        self,
        model: Soundwave,
        limits: Limits,
        metrics: Metrics,
        batching: bool = True,
        vllm: VLLM | None = None,
    ):
        self.model, self.limits, self.metrics, self.batching = model, limits, metrics, batching
        self.vllm = vllm
        self.sent: dict[int, Job] = {}  # to vLLM and not answered yet, by the job's identity
        self.context = None if model.llm is None else context_length(base_of(model.llm).config)
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable[[], object], Future | None]] = deque()
        self.recogniser = Recogniser(model, self.call)
        self.changed = threading.Condition()
        self.closed = False
        self.running = 0
        self.seconds_per_job = 1.0  # moving average, for Retry-After
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        warnings.simplefilter("ignore", SoundWarning)  # inputs.py reports what they would

    def start(self) -> None:
        self.thread.start()

    def submit(self, job: Job, admitted: bool = False) -> None:
        """Queue a job. admitted: it belongs to a request that is being answered already. Errors: Problem
        (429, 503)."""
        with self.changed:
            if self.closed:
                raise Problem(503, "the server is shutting down", code="draining", retry_after=5)
            if not admitted and len(self.waiting) >= self.limits.waiting_jobs:
                raise self.full()
            job.queued = time.monotonic()
            self.waiting.append(job)
            self.metrics.waiting.set(len(self.waiting))
            self.changed.notify()

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread, before the next batch; return what it returns."""
        future: Future = Future()
        with self.changed:
            if self.closed:
                raise Problem(503, "the server is shutting down", code="draining", retry_after=5)
            self.calls.append((function, future))
            self.changed.notify()
        return future.result()

    def post(self, function: Callable[[], object]) -> None:
        """Run a function in the engine's thread, before the next batch; do not wait for it."""
        with self.changed:
            self.calls.append((function, None))
            self.changed.notify()

    @property
    def is_alive(self) -> bool:
        is_working = self.thread.is_alive() and not self.closed
        return is_working and (self.vllm is None or self.vllm.alive)

    def full(self) -> Problem:
        wait = min(60.0, self.seconds_per_job * (len(self.waiting) + 1))
        return Problem(
            429, "the server is busy: try again later", code="queue_full", retry_after=max(1.0, wait)
        )

    def close(self, timeout: float | None = None) -> None:
        """Answer what is queued, then end the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout)

    # ---- the worker thread ----

    def _work(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            began = time.monotonic()
            self._answer(batch)
            took = (time.monotonic() - began) / len(batch)
            self.seconds_per_job = 0.8 * self.seconds_per_job + 0.2 * took

    def _next(self) -> list[Job] | None:
        """Return the next batch; None at the end."""
        while True:
            with self.changed:
                self.running = len(self.sent)
                self.metrics.running.set(self.running)
                while not self.calls and not (self.waiting and self._room()):
                    if self.closed and not self.waiting and not self.sent:
                        return None
                    self.changed.wait()
                call = self.calls.popleft() if self.calls else None
                if call is None:
                    return self._next_batch()
            function, future = call
            try:
                result = function()
                if future is not None:
                    future.set_result(result)
            except Exception as error:
                if future is None:
                    logger.error("a call failed: %s: %s", type(error).__name__, error, exc_info=True)
                else:
                    future.set_exception(error)

    def _room(self) -> int:
        """Return how many more jobs may run: vLLM's queue stays short, so that the server's own is full
        first."""
        return self.limits.batch_rows - len(self.sent)

    def _next_batch(self) -> list[Job]:
        until = time.monotonic() + self.limits.batch_wait
        while self.batching and (left := until - time.monotonic()) > 0 and not self.closed:
            self.changed.wait(left)
        batch = self._take()
        self.running = len(self.sent) + len(batch)
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(self.running)
        now = time.monotonic()
        for job in batch:
            job.started = now
            self.metrics.queue_seconds.observe(now - job.queued)
        return batch

    def _take(self) -> list[Job]:
        batch = [self.waiting.popleft()]
        if self.batching:
            left: deque[Job] = deque()
            for job in self.waiting:
                if self._may_join(job, batch):
                    batch.append(job)
                else:
                    left.append(job)
            self.waiting = left
        return batch

    def _may_join(self, job: Job, batch: list[Job]) -> bool:
        if len(batch) >= self._room() or not self.fits([*batch, job]):
            return False
        return self.vllm is not None or job.sampling == batch[0].sampling

    def fits(self, jobs: list[Job]) -> bool:
        """Return whether jobs may be one batch: within the limits, and each with the whole LLM context
        that it has alone."""
        rows = len(jobs)
        audios = sum(max(1, len(job.waveforms)) for job in jobs)
        longest = max(job.longest_seconds for job in jobs)
        positions = max(job.positions for job in jobs) + max(job.max_new_tokens for job in jobs)
        return (
            rows <= self.limits.batch_rows
            and audios * longest <= self.limits.batch_seconds
            and rows * positions <= self.limits.batch_tokens
            and (self.context is None or positions <= self.context)
        )

    def _answer(self, batch: list[Job]) -> None:
        now = time.monotonic()
        for job in batch:
            if job.cancelled or now > job.deadline:
                job.fail(late())
        batch = [job for job in batch if not job.finished]
        if not batch:
            return
        try:
            self._run(batch)
        except Exception as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            left = [job for job in batch if not job.finished]
            if len(batch) == 1:
                logger.error(
                    "a job failed: %s: %s",
                    type(error).__name__,
                    error,
                    extra={"request_id": batch[0].request_id},
                    exc_info=True,
                )
                batch[0].fail(Problem(500, "the request could not be answered", code="internal_error"))
                return
            logger.warning("a batch of %d failed (%s): repeated one by one", len(batch), type(error).__name__)
            for job in left:
                if job.said and job.sampling.temperature:
                    job.fail(Problem(500, "the answer was interrupted", code="internal_error"))
                else:
                    self._answer([job])

    @torch.inference_mode()
    def _run(self, batch: list[Job]) -> None:
        model = self.model
        prompts = model.prompts(
            [job.chat for job in batch], [clip for job in batch for clip in job.waveforms]
        )
        audios = max(1, sum(len(job.waveforms) for job in batch))
        self.metrics.batch_rows.observe(len(batch))
        self.metrics.padded_seconds.inc(audios * max(job.longest_seconds for job in batch))
        text_tokens = prompts.attention_mask.sum(1).tolist()
        first = [sum(len(job.waveforms) for job in batch[:row]) for row in range(len(batch))]
        known = {
            first[row]: job.window.outputs
            for row, job in enumerate(batch)
            if job.window is not None and job.window.outputs
        }
        audio = model.encode_audio(prompts, frames=ctc_frames(model, prompts, known))

        def finish(row: int, tokens: list[int], reason: str) -> None:
            own = slice(first[row], first[row] + len(batch[row].waveforms))
            positions = text_tokens[row] - len(batch[row].waveforms) + int(audio.kept_lengths[own].sum())
            rows = list(range(own.start, own.stop))
            self._finish(batch[row], tokens, reason, positions, audio.rows(rows))

        for row, job in enumerate(batch):
            if job.gated and self.recogniser.is_silent(job.waveforms[0], audio, first[row]):
                finish(row, [], "stop")
        if all(job.finished for job in batch):
            return
        if model.llm is None:
            for row, text in enumerate(model.ctc_greedy(prompts, audio=audio)):
                finish(row, model.tokenizer.encode(text, add_special_tokens=False), "stop")
            return
        stop = end_ids(model.tokenizer, model.config.prompt, base_of(model.llm).generation_config)
        if self.vllm is not None:
            self._send(self.vllm, batch, prompts, audio, stop, finish)
            return
        streamer = RowStreamer(batch, model.tokenizer, stop, finish, lambda: model.unanswered)
        with contextlib.suppress(AllAnswered):
            model.generate(
                prompts,
                max_new_tokens=max(job.max_new_tokens for job in batch),
                streamer=streamer,
                audio=audio,
                **batch[0].sampling.options,
            )

    def _send(
        self,
        vllm: VLLM,
        batch: list[Job],
        prompts: Batch,
        audio: Audio,
        stop: list[int],
        finish: Callable[[int, list[int], str], None],
    ) -> None:
        """Send the prompts of a batch to vLLM."""
        embeddings = self.model.prompt_embeddings(prompts, audio)
        refused = self.model.unanswered
        for row, job in enumerate(batch):
            if not job.finished:
                answering = _Answering(self, vllm, job, row, refused, stop, finish)
                answering.send(embeddings[row])

    def _finish(
        self,
        job: Job,
        tokens: list[int],
        reason: str,
        positions: int,
        audio: Audio,
    ) -> None:
        """audio: the job's own."""
        text = job.shown(str(self.model.tokenizer.decode(tokens, skip_special_tokens=True)))
        answer = Answer(text, tokens, reason, positions)
        if job.streams and text.startswith(job.said):
            job.say(text[len(job.said) :])
        if job.word_times:
            spelling = spell(self.model.tokenizer, text, self.model.ctc_text, job.language)
            seconds = job.longest_seconds if job.window is None else job.window.frames_seconds
            aligned = align_frames(self.model, audio.hidden, audio.lengths, [spelling], [seconds])[0]
            answer.words = aligned.words
            if aligned.problem and aligned.words:
                answer.warnings.append(f"words have no times: {aligned.problem}")
        if job.with_frames:
            start = 0.0 if job.window is None else job.window.frames_origin / SAMPLE_RATE
            for number, clip in enumerate(job.waveforms):
                seconds = len(clip) / SAMPLE_RATE if job.window is None else job.window.frames_seconds
                own = audio.rows([number])
                answer.frames.append(frames_of(self.model, own, seconds, start, job.language))
        self.metrics.tokens.inc(len(tokens))
        job.finish(answer)


class _Answering:
    """One job's answer by vLLM. Its tokens arrive in another thread and are handled in the engine's."""

    def __init__(
        self,
        engine: Engine,
        vllm: VLLM,
        job: Job,
        row: int,
        refused: dict[int, str],
        stop: list[int],
        finish: Callable[[int, list[int], str], None],
    ):
        """row: of the batch; refused: rows beyond the LLM's context, and why."""
        self.engine, self.vllm, self.job, self.stop = engine, vllm, job, stop
        self.number: int | None = None
        own = {0: refused[row]} if row in refused else {}
        self.streamer = RowStreamer(
            [job], engine.model.tokenizer, stop, lambda _, *answer: finish(row, *answer), lambda: own
        )

    def send(self, embeddings: torch.Tensor) -> None:
        """embeddings [L, D]: the prompt."""
        try:
            self.streamer.put(torch.empty(0))
        except AllAnswered:
            return
        tokens = self.engine.model.answer_room(len(embeddings), self.job.max_new_tokens)
        with self.engine.changed:
            self.engine.sent[id(self.job)] = self.job
        self.number = self.vllm.submit(
            embeddings,
            max_tokens=tokens,
            sampling=self.job.sampling,
            stop=self.stop,
            receive=lambda tokens, why: self.engine.post(lambda: self._receive(tokens, why)),
            fail=lambda why: self.engine.post(lambda: self._fail(why)),
        )

    @torch.inference_mode()
    def _receive(self, tokens: list[int], why: str | None) -> None:
        if id(self.job) not in self.engine.sent:  # it has ended already
            return
        try:
            for token in tokens:
                self.streamer.put(torch.tensor([token]))
            if why is not None:  # at the longest answer, or by an end token that vLLM keeps to itself
                self.streamer.end(why)
        except AllAnswered:
            if why is None and self.number is not None:
                self.vllm.cancel(self.number)
        except Exception as error:
            logger.error("a job failed: %s: %s", type(error).__name__, error, exc_info=True)
            self.job.fail(Problem(500, "the request could not be answered", code="internal_error"))
        if self.job.finished:
            self._end()

    def _fail(self, why: str) -> None:
        logger.error("vLLM did not answer: %s", why, extra={"request_id": self.job.request_id})
        if self.vllm.alive:
            self.job.fail(Problem(500, "the request could not be answered", code="internal_error"))
        else:
            self.job.fail(Problem(503, "the server cannot answer: its LLM has ended", code="unavailable"))
        self._end()

    def _end(self) -> None:
        with self.engine.changed:
            self.engine.sent.pop(id(self.job), None)
