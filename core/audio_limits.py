"""What one clip may cost, what one decoded stream is, and the one error for audio that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import soundfile

from core.console import OneLine, one_line
from core.containers import NotAFile

MAX_SECONDS = 4 * 3600.0
#: Most bytes of one clip's decoded samples: frames x channels x bytes a sample.
MAX_DECODED_BYTES = 1 << 31

Reason = Literal[
    "missing_file",  # no such file
    "unreadable",  # the file system refuses it, or it is a folder, FIFO or device
    "undecodable",  # no decoder reads it
    "no_decoder",  # needs an optional package; the text names the command
    "zero_length",  # no samples, or none in the segment
    "truncated",  # it is cut: the text names what is missing
    "not_finite",  # NaN or infinity
    "too_long",  # more than max_seconds
    "too_large",  # more bytes than allowed, in the file or decoded; or there is no memory for it
    "odd_rate",  # a rate that cannot be resampled or encoded
    "command_failed",  # the command that writes it (a pipe of a corpus)
]


class AudioError(OneLine, ValueError):
    """Audio that cannot be used. str() is one line; `reason` a fixed word; `seconds` its length if known."""

    def __init__(self, reason: Reason, detail: str, seconds: float | None = None):
        super().__init__(detail)
        self.reason, self.seconds = reason, seconds


@contextmanager
def typed_errors(name: str = "") -> Iterator[None]:
    """Turn whatever reading and decoding raise into AudioError; its text begins with `name`."""
    prefix = f"{name}: " if name else ""
    try:
        yield
    except AudioError as error:
        raise AudioError(error.reason, f"{prefix}{error}", error.seconds) from None
    except FileNotFoundError:
        raise AudioError("missing_file", f"{prefix}does not exist") from None
    except NotAFile as error:
        raise AudioError("unreadable", f"{prefix}{error}") from None
    except OSError as error:
        raise AudioError("unreadable", f"{prefix}{error.strerror or error}") from None
    except MemoryError:
        raise AudioError("too_large", f"{prefix}there is not enough memory to decode it") from None
    except soundfile.LibsndfileError as error:
        raise AudioError("undecodable", prefix + words_of(error)) from None
    # decoders raise RuntimeError, ValueError, OverflowError, struct.error, and errors of their own
    except Exception as error:
        raise AudioError("undecodable", f"{prefix}{one_line(error)}") from None


def words_of(error: soundfile.LibsndfileError) -> str:
    """libsndfile's own words, in one line."""
    return (
        " ".join(error.error_string.split()).removeprefix("Error : ").strip(" .")
        or "libsndfile gives no reason"
    )


class Limits:
    """What one clip may cost: seconds, and bytes of decoded samples. Checked by its header, then while it is
    decoded."""

    def __init__(self, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_DECODED_BYTES):
        self.max_seconds, self.max_bytes = max_seconds, max_bytes
        self._seconds, self._bytes = 0.0, 0

    def check(self, frames: int, rate: int, channels: int, width: int) -> tuple[float, int]:
        """Return (seconds, bytes) with `frames` more, a sample being `width` bytes. Errors: AudioError
        too_long | too_large."""
        seconds, size = self._seconds + frames / rate, self._bytes + frames * channels * width
        if seconds > self.max_seconds:
            raise AudioError("too_long", f"{seconds:.3f} s, more than {self.max_seconds:g}", seconds)
        if size > self.max_bytes:
            what = f"{seconds:.3f} s of {channels} channel{'s' * (channels > 1)} at {rate:,} Hz"
            raise AudioError(
                "too_large", f"{what} are {size:,} bytes decoded, more than {self.max_bytes:,}", seconds
            )
        return seconds, size

    def add(self, frames: int, rate: int, channels: int, width: int) -> None:
        """Count decoded frames. Errors: as `check`."""
        self._seconds, self._bytes = self.check(frames, rate, channels, width)


class Piece(NamedTuple):
    """One decoded stream."""

    samples: np.ndarray  # [frames, channels] int16 or float32
    rate: int
    container: str  # libsndfile's name, or FFmpeg's
    subtype: str
    promised: int | None = None  # frames by its header, None where it does not tell them
    slack: float = 0.05  # seconds that a lossy codec's promise may differ by
    is_cut: str = ""  # why it is known to be cut

    def missing(self) -> str:
        """Return what is missing of what the header declares, in words; "" for nothing."""
        if self.promised is not None and len(self.samples) < self.promised - self.slack * self.rate:
            decoded, promised = len(self.samples) / self.rate, self.promised / self.rate
            return f"its header declares {promised:.3f} s, {decoded:.3f} s can be decoded"
        return self.is_cut
