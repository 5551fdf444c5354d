"""Tokens of a batch that is being generated, handed to its jobs row by row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from serving.jobs import Job
from serving.problems import Problem


class AllAnswered(Exception):
    """Ends a generation whose jobs have all been answered, given up or cancelled."""


def settled(text: str) -> str:
    """Return the part of an unfinished answer that further tokens cannot change: up to its last white space,
    or all of it where it ends in a script that is written without spaces."""
    if text and not text.endswith("\ufffd") and _is_wide(text[-1]):
        return text
    end = max(text.rfind(" "), text.rfind("\n"))
    return text[: end + 1].rstrip(" \n") if end >= 0 else ""


def _is_wide(character: str) -> bool:
    return "\u3040" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7af"


class RowStreamer(BaseStreamer):
    """transformers' streamer for batches: each row ends by itself at an end token or its own longest answer.

    finish(row, tokens, reason) is called once for each row that ends. A row whose job is cancelled or late
    ends without it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        finish: Callable[[int, list[int], str], None],
        refused: Callable[[], dict[int, str]],
    ):
        self.jobs, self.tokenizer, self.stop, self.finish = jobs, tokenizer, set(stop), finish
        self.refused = refused
        self.tokens: list[list[int]] = [[] for _ in jobs]
        self.open = {row for row, job in enumerate(jobs) if not job.finished}
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt's ids
            self._begin()
            self._check()
            return
        now = time.monotonic()
        for row, token in enumerate(value.reshape(-1).tolist()):
            job = self.jobs[row]
            if row not in self.open:
                continue
            if job.cancelled or now > job.deadline:
                self.open.discard(row)
                job.fail(late())
            elif token in self.stop:
                self._end(row, "stop")
            else:
                self.tokens[row].append(token)
                if len(self.tokens[row]) >= job.max_new_tokens:
                    self._end(row, "length")
                elif job.streams:
                    self._stream(row)
        self._check()

    def end(self, reason: str = "length") -> None:
        """The LLM's context is full, or every row has ended, or no row fits into the context."""
        if not self.prompt_seen:
            self._begin()
        for row in sorted(self.open):
            self._end(row, reason)

    def _begin(self) -> None:
        self.prompt_seen = True
        for row, text in self.refused().items():
            self.open.discard(row)
            self.jobs[row].fail(Problem(400, _of_row(text), code="context_length_exceeded"))

    def _check(self) -> None:
        if not self.open:
            raise AllAnswered

    def _end(self, row: int, reason: str) -> None:
        self.open.discard(row)
        self.finish(row, self.tokens[row], reason)

    def _stream(self, row: int) -> None:
        job = self.jobs[row]
        text = settled(job.shown(str(self.tokenizer.decode(self.tokens[row], skip_special_tokens=True))))
        if text.startswith(job.streamed):
            job.stream(text[len(job.streamed) :])


def _of_row(text: str) -> str:
    """Return a message about a conversation of a batch in the words for a client, which sent one."""
    _, _, rest = text.partition(" takes ")
    return f"the conversation takes {rest}" if rest else text


def late() -> Problem:
    return Problem(504, "the time limit of a request on this server was reached", code="timeout")
