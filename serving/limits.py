"""What one request and all waiting requests may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 128 << 20  # of one request: an hour of 16-bit WAV at 16 kHz has 115 MB
    audio_seconds: float = 7200.0  # of all audio of one request
    audios: int = 8  # of one chat
    question_characters: int = 16_384  # of all text of one chat
    new_tokens: int = 512  # of one answer
    request_seconds: float = 600.0  # from the request's arrival to its last byte
    waiting_jobs: int = 128  # in the queue; further requests get status 429
    open_requests: int = 64  # read, waiting or running; further ones get status 429
    batch_rows: int = 32
    batch_seconds: float = 240.0  # of padded audio: rows x the longest
    batch_tokens: int = 32_768  # rows x (the longest prompt, audio included, + the longest answer)
    batch_wait: float = 0.005  # seconds to wait for company after the first job of an idle server
