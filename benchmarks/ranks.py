"""Processes of a benchmark that work together, each with a log and an answer."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def answers_of(
    target: Callable[..., None], arguments: Sequence[tuple], logs: Sequence[Path], preload: list[str]
) -> list[Any]:
    """Call target(*arguments, log, answers) in a process for each pair of `arguments` and `logs`; return what
    each puts into the queue `answers`, in any order. preload: modules that all of these need.

    Errors: RuntimeError with the end of the log of the first one that fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    answers = context.Queue()
    running = [
        context.Process(target=target, args=(*own, log, answers))
        for own, log in zip(arguments, logs, strict=True)
    ]
    for process in running:
        process.start()
    for process, log in zip(running, logs, strict=True):
        process.join()
        if process.exitcode:
            raise RuntimeError(log.read_text()[-2000:])
    return [answers.get() for _ in running]
