"""The queue in front of the model: one thread encodes audio and answers the jobs.

Jobs start in the order of their arrival while the padded audio, the padded tokens and the rows stay within
the limits. They join the rows that are being answered between two passes of the LLM, and a row leaves as soon
as it ends (model/generation/running.py). A batch that fails is repeated job by job, so that one job cannot
fail the others.

An LLM whose cache cannot be cut answers batch by batch instead: the next batch starts when the last one has
ended. With vLLM (soundwave/vllm.py) this thread encodes and compresses the audio of a batch and sends each
row's embeddings on; their tokens come back as calls into this thread.
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
from typing import NamedTuple, TypeVar

import torch

from core.audio import SAMPLE_RATE
from core.spelling import spell
from model.batch import Batch
from model.generation.running import Row, RunningBatch
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
Finish = Callable[[int, list[int], str], None]


class _Answer(NamedTuple):
    """A job that the LLM is answering, and what takes its tokens."""

    job: Job
    row: Row
    streamer: RowStreamer


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
        self.answers: list[_Answer] = []  # in the order of the running batch's rows
        self.running_batch = None if model.llm is None else RunningBatch(model.llm, model.audio_id)
        self.context = None if model.llm is None else context_length(base_of(model.llm).config)
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable[[], object], Future | None]] = deque()
        self.recogniser = Recogniser(model, self.call)
        self.changed = threading.Condition()
        self.closed = False
        self.running = 0
        self.seconds_per_job = 1.0  # moving average of a busy server, for Retry-After
        self.last_end = 0.0  # time.monotonic()
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        warnings.simplefilter("ignore", SoundWarning)  # inputs.py reports what they would

    def start(self) -> None:
        self.thread.start()

    def submit(self, job: Job, admitted: bool = False) -> None:
        """Queue a job. admitted: it belongs to a request that is being answered already. Errors: Problem
        (429, 503)."""
        positions = job.positions + job.max_new_tokens
        is_static = self.vllm is None and self.model.draft_refusal(positions) is not None
        with self.changed:
            if self.closed:
                raise Problem(503, "the server is shutting down", code="draining", retry_after=5)
            if not admitted and len(self.waiting) >= self.limits.waiting_jobs:
                raise self.full()
            job.queued, job.is_static = time.monotonic(), is_static
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
        while (batch := self._next()) is not None:
            if batch:
                self._answer(batch)
            self._step()

    def _next(self) -> list[Job] | None:
        """Make the calls that wait; return the jobs that start now, none while rows run and no job may join
        them; None at the end."""
        while True:
            with self.changed:
                self._count()
                while not (self.calls or self.answers or (self.waiting and self._places())):
                    if self.closed and not self.waiting and not self.sent:
                        return None
                    self.changed.wait()
                calls, self.calls = self.calls, deque()
                if not calls:
                    return self._next_batch()
            for function, future in calls:
                self._call(function, future)
            if self.answers:  # a stream of calls holds neither rows nor jobs up
                with self.changed:
                    return self._next_batch()

    def _call(self, function: Callable[[], object], future: Future | None) -> None:
        try:
            result = function()
            if future is not None:
                future.set_result(result)
        except Exception as error:
            if future is None:
                logger.error("a call failed: %s: %s", type(error).__name__, error, exc_info=True)
            else:
                future.set_exception(error)

    def _count(self, starting: int = 0) -> None:
        self.running = len(self.sent) + len(self.answers) + starting
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(self.running)

    def _places(self) -> int:
        """Return how many more jobs may run. vLLM's queue stays short, so that the server's own is full
        first."""
        return self.limits.batch_rows - len(self.sent) - len(self.answers)

    def _next_batch(self) -> list[Job]:
        until = time.monotonic() + (0.0 if self.answers else self.limits.batch_wait)
        while self.batching and (left := until - time.monotonic()) > 0 and not self.closed:
            self.changed.wait(left)
        batch = self._take()
        self._count(len(batch))
        now = time.monotonic()
        for job in batch:
            job.started = now
            self.metrics.queue_seconds.observe(now - job.queued)
        return batch

    def _take(self) -> list[Job]:
        """Take the jobs that start now out of the queue. While the first one may not start, none may."""
        batch: list[Job] = []
        left: deque[Job] = deque()
        for job in self.waiting:
            if (batch or not left) and self._may_join(job, batch):
                batch.append(job)
            else:
                left.append(job)
        self.waiting = left
        return batch

    def _may_join(self, job: Job, batch: list[Job]) -> bool:
        running = [answer.job for answer in self.answers]
        if not batch and not running:
            return True
        if not self.batching or self._places() <= len(batch):
            return False
        if batch and job.is_static != batch[0].is_static:
            return False
        if job.is_static:
            return not batch or (job.sampling == batch[0].sampling and self.fits([*batch, job]))
        return self.fits([*batch, job], running)

    def fits(self, starting: list[Job], running: list[Job] | None = None) -> bool:
        """Return whether jobs may start together beside those that run: within the limits, and, where they
        are answered batch by batch, each with the whole LLM context that it has alone."""
        jobs = [*starting, *(running or [])]
        audios = sum(max(1, len(job.waveforms)) for job in starting)
        longest = max(job.longest_seconds for job in starting)
        positions = max(job.positions for job in jobs) + max(job.max_new_tokens for job in jobs)
        return (
            len(jobs) <= self.limits.batch_rows
            and audios * longest <= self.limits.batch_seconds
            and len(jobs) * positions <= self.limits.batch_tokens
            and (self.context is None or not starting[0].is_static or positions <= self.context)
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
            self._failed(batch, error)

    def _failed(self, batch: list[Job], error: Exception) -> None:
        """Answer the jobs of a failed batch one by one; refuse a job that failed alone."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name = type(error).__name__
        if len(batch) == 1:
            job = batch[0]
            logger.error(
                "a job failed: %s: %s", name, error, extra={"request_id": job.request_id}, exc_info=True
            )
            job.fail(Problem(500, "the request could not be answered", code="internal_error"))
            return
        logger.warning("a batch of %d failed (%s): repeated one by one", len(batch), name)
        for job in batch:
            if job.finished:
                continue
            if job.streamed and job.sampling.temperature:
                job.fail(Problem(500, "the answer was interrupted", code="internal_error"))
                continue
            self._answer([job])
            while self.answers and not job.finished:
                self._step()

    @torch.inference_mode()
    def _step(self) -> None:
        """Run one pass of the LLM over the rows that are being answered."""
        self.answers = [answer for answer in self.answers if not answer.row.ended]
        if not self.answers or self.running_batch is None:
            return
        try:
            written = self.running_batch.step()
        except Exception as error:
            failed, self.answers = [answer.job for answer in self.answers], []
            self.running_batch = RunningBatch(self.running_batch.llm, self.model.audio_id)
            self._failed(failed, error)
            return
        for answer, tokens in zip(self.answers, written, strict=True):
            self._receive(answer, tokens)

    def _receive(self, answer: _Answer, tokens: list[int]) -> None:
        """Hand the new tokens of a row to its job."""
        job, row, streamer = answer
        try:
            for token in tokens:
                streamer.put(torch.tensor([token]))
            if row.ended:  # at the longest answer that the LLM's context leaves
                streamer.end()
        except AllAnswered:
            row.ended = True
        except Exception as error:
            row.ended = True
            self._failed([job], error)

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
        if self.running_batch is not None and not batch[0].is_static:
            self._join(self.running_batch, batch, prompts, audio, stop, finish)
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

    def _join(
        self,
        running: RunningBatch,
        batch: list[Job],
        prompts: Batch,
        audio: Audio,
        stop: list[int],
        finish: Finish,
    ) -> None:
        """Add the jobs of a batch to those that are being answered."""
        self.answers = [answer for answer in self.answers if not answer.row.ended]
        places = [place for place, job in enumerate(batch) if not job.finished]
        most = [job.max_new_tokens for job in batch]
        choices = [job.sampling.choice for job in batch]
        rows = self.model.join(running, prompts, audio, places, most, choices)
        refused = self.model.unanswered
        answers = []
        for place in places:
            own = {0: refused[place]} if place in refused else {}
            streamer = self._streamer(batch[place], place, own, stop, finish)
            with contextlib.suppress(AllAnswered):
                streamer.put(torch.empty(0))  # the prompt; a refused job ends here
            if place in rows:
                answers.append(_Answer(batch[place], rows[place], streamer))
        self.answers += answers
        for answer in answers:
            self._receive(answer, answer.row.answer)

    def _streamer(
        self, job: Job, place: int, refused: dict[int, str], stop: list[int], finish: Finish
    ) -> RowStreamer:
        """Return a streamer of one job alone, which is `place` for `finish`."""
        return RowStreamer(
            [job], self.model.tokenizer, stop, lambda _, *answer: finish(place, *answer), lambda: refused
        )

    def _send(
        self,
        vllm: VLLM,
        batch: list[Job],
        prompts: Batch,
        audio: Audio,
        stop: list[int],
        finish: Finish,
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
        if job.streams and text.startswith(job.streamed):
            job.stream(text[len(job.streamed) :])
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
        now = time.monotonic()
        took, self.last_end = now - max(self.last_end, job.started), now
        self.seconds_per_job = 0.8 * self.seconds_per_job + 0.2 * took
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
        finish: Finish,
    ):
        """row: of the batch; refused: rows beyond the LLM's context, and why."""
        self.engine, self.vllm, self.job, self.stop = engine, vllm, job, stop
        self.number: int | None = None
        own = {0: refused[row]} if row in refused else {}
        self.streamer = engine._streamer(job, row, own, stop, finish)

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
