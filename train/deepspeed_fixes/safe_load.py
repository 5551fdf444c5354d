"""Load DeepSpeed's checkpoint files as data: whatever is in them, no code is run.

    python -m train.deepspeed_fixes.safe_load ARGUMENTS        deepspeed.checkpoint.ds_to_universal, loading
    in this way

A .pt file is a pickle, which can name any function to be called. DeepSpeed 0.19.8 says weights_only=False in
each of its calls of torch.load (to be changed, says https://github.com/deepspeedai/DeepSpeed/pull/6751).
PyTorch's own switch overrules them: only tensors, plain containers and the classes named here can then be in
a file.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from core.console import one_line

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def allowed_classes() -> list[type]:
    """Return the classes that DeepSpeed 0.19.8 stores beside tensors (ZeRO-1 to 3, offloaded or not, fp32 and
    bf16)."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Make every torch.load inside refuse code, with pickle.UnpicklingError."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with torch.serialization.safe_globals(list(allowed_classes())):
            yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


class UnsafeCheckpoint(ValueError):
    """A checkpoint file whose names would become paths outside its folder; one line."""


def check_names(folder: Path) -> None:
    """Refuse keys that are paths: ds_to_universal makes a folder of each parameter and a file of each of its
    states.

    Tensors are mapped, not read. Errors: UnsafeCheckpoint.
    """
    for path in sorted(folder.glob("*.pt")):
        waiting = [torch.load(path, map_location="cpu", mmap=True, weights_only=True)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                for key in value:
                    if isinstance(key, str) and ("/" in key or "\0" in key or key in (".", "..")):
                        raise UnsafeCheckpoint(
                            f"{path.name} holds the name {ascii(key)[:100]}, which is a path"
                        )
                waiting += value.values()
            elif isinstance(value, (list, tuple)):
                waiting += value


def reason(error: BaseException) -> str:
    """Return in one line why a file was refused."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL:? (?:GLOBAL )?([\w.]+)", str(error))
        return (
            f"it names {named[1]}, and so would run code when it is loaded"
            if named
            else "it is no file of tensors alone"
        )
    return one_line(error)


def main(arguments: list[str]) -> int:
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = [ds_to_universal.__name__, *arguments]
    try:
        with data_only():
            options = ds_to_universal.parse_arguments()
            check_names(Path(options.input_folder))
            ds_to_universal.main(options)
    except Exception as error:  # of whatever a file holds
        print(reason(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
