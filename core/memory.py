"""Whether an exception is a lack of memory, on the GPU or the CPU."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is about memory.

    PyTorch has no type of its own for CPU memory, thus its text counts.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
