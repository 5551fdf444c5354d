"""Recordings of any length as windows, cut at pauses as `soundwave` cuts them offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from core.audio import SAMPLE_RATE, AudioError, is_silent
from model.soundwave import Audio, Soundwave
from serving.problems import invalid
from soundwave.recogniser import GATE, Options, SpeechModel, _Job
from soundwave.windows import Window

SCAN_SECONDS = 60.0  # of audio that is scanned for pauses at a time, between two batches
Result = TypeVar("Result")


class Recogniser(SpeechModel):
    """The offline recogniser, its scans for pauses done by `call`: in the engine's thread."""

    def __init__(self, network: Soundwave, call: Callable[[Callable[[], Any]], Any]):
        super().__init__(network)
        self._call = call

    def _scan(self, chunks):
        scan = super()._scan
        return self._call(lambda: scan(chunks))

    def is_silent(self, samples: torch.Tensor, audio: Audio, row: int) -> bool:
        """Whether a window has no speech; audio: what `listen` gave, of which `row` is the window's."""
        return is_silent(samples.numpy()) or not self._has_speech(audio, row, GATE)


class Recording:
    """An uploaded recording. windows() cuts it; seconds and notes are complete at the end."""

    def __init__(self, recogniser: Recogniser, data: bytes, most: float):
        """most: seconds that it may last."""
        self.recogniser, self.data, self.most = recogniser, data, most
        self.job = _Job(0)

    @property
    def seconds(self) -> float:
        return self.job.samples / SAMPLE_RATE

    @property
    def notes(self) -> list[str]:
        return list(self.job.notes)

    def windows(self) -> Iterator[Window]:
        """Errors: Problem, also for a recording that turns out to be too long."""
        if not self.data:
            raise invalid("the audio is empty", "file")
        setup = self.recogniser._setup(Options(batch_seconds=SCAN_SECONDS))
        try:
            for piece in self.recogniser._pieces(self.data, SAMPLE_RATE, setup, self.job):
                self._check_length()
                yield piece.window
            self._check_length()
        except AudioError as error:
            if error.reason in ("too_long", "too_large"):
                raise self._too_long() from None
            raise invalid(f"the audio cannot be decoded: {error}", "file", "invalid_audio") from None

    def _check_length(self) -> None:
        if self.seconds > self.most:
            raise self._too_long()

    def _too_long(self):
        return invalid(f"the audio is too long: {self.most:g} s at most here", "file", "audio_too_long")
