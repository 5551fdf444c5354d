"""One piece of work for the model, and how its answer comes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from model.generation.timestamps import Word
from serving.problems import Problem
from soundwave.vllm import Sampling
from soundwave.windows import Window


@dataclass
class Answer:
    text: str
    tokens: list[int] = field(default_factory=list)
    finish: str = "stop"  # or "length"
    prompt_tokens: int = 0  # text and compressed audio frames
    words: list[Word] = field(default_factory=list)  # with their times, where the job asked for them
    frames: list[dict] = field(default_factory=list)  # serving/frames.py, of each audio, on request
    warnings: list[str] = field(default_factory=list)


class Listener(Protocol):
    """Receives a job's answer, from the engine's thread."""

    def text(self, piece: str) -> None: ...

    def done(self, answer: Answer) -> None: ...

    def failed(self, problem: Problem) -> None: ...


@dataclass(eq=False)
class Job:
    chat: list[dict]  # turns as of core.samples.messages_of
    waveforms: list[torch.Tensor]  # each [S] at 16 kHz
    positions: int  # that the prompt takes in the LLM at most, audio included
    max_new_tokens: int
    deadline: float  # time.monotonic()
    listener: Listener
    sampling: Sampling = Sampling()
    streams: bool = False  # whether pieces of text are wanted before the whole
    is_transcript: bool = False  # its white space is single spaces
    gated: bool = False  # whether silence is answered by nothing
    word_times: bool = False
    language: str | None = None  # of the answer, for its words
    with_frames: bool = False
    window: Window | None = None  # what its audio is of a longer recording
    request_id: str = ""
    queued: float = field(default_factory=time.monotonic)
    started: float = 0.0
    is_static: bool = False  # whether the LLM answers it in a batch of its own
    cancelled: bool = False
    finished: bool = False
    streamed: str = ""  # text that the listener has received

    @property
    def longest_seconds(self) -> float:
        return max((len(one) for one in self.waveforms), default=0) / 16_000

    def shown(self, text: str) -> str:
        return " ".join(text.split()) if self.is_transcript else text

    def stream(self, piece: str) -> None:
        if piece and not self.finished:
            self.streamed += piece
            self.listener.text(piece)

    def finish(self, answer: Answer) -> None:
        if not self.finished:
            self.finished = True
            self.listener.done(answer)

    def fail(self, problem: Problem) -> None:
        if not self.finished:
            self.finished = True
            self.listener.failed(problem)


class Inbox:
    """A job's listener in an event loop: an asynchronous queue of ("text" | "done" | "failed", value)."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def _put(self, kind: str, value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the request
            self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))

    def text(self, piece: str) -> None:
        self._put("text", piece)

    def done(self, answer: Answer) -> None:
        self._put("done", answer)

    def failed(self, problem: Problem) -> None:
        self._put("failed", problem)
