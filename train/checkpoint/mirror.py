"""A copy of each finished checkpoint in a second folder, made by a thread."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

from core.files import PARTIAL, sync_folder, write_atomically
from recipe.config import CheckpointConfig
from train.checkpoint.retention import delete_after, prune, remove_replaced

logger = logging.getLogger("soundwave")
COPY_SECONDS = 60  # a second file system that takes longer for one checkpoint misses the next
LAST_COPY_SECONDS = 1800  # for the last copy, at the end of a run


class Mirror:
    """Copies to `checkpoint.copy_to`; does nothing where that is not set. Used by rank 0 alone."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.thread: threading.Thread | None = None
        self.copying: Path | None = None  # the checkpoint that the thread reads

    @property
    def target(self) -> Path | None:
        return Path(self.config.copy_to) if self.config.copy_to else None

    def clean_up(self) -> None:
        """Remove what a kill left in the second folder."""
        if self.target is None:
            return
        remove_replaced(self.target)
        for leftover in self.target.glob("step-*" + PARTIAL):
            shutil.rmtree(leftover, ignore_errors=True)

    def start(self, source: Path) -> None:
        """Copy a finished checkpoint; the copy before it has ended."""
        if self.target is None:
            return
        self.copying = source
        self.thread = threading.Thread(
            target=self._copy, args=(source,), name="checkpoint-copier", daemon=True
        )
        self.thread.start()

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for the copy in progress, if any; not for ever: a second file system that hangs must not hold
        up the run."""
        if self.thread is not None:
            self.thread.join(seconds)
            if self.thread.is_alive():
                logger.error(
                    "checkpoint.copy_to: %s has not taken %s in %d s; the run does not wait for it",
                    self.config.copy_to,
                    self.copying.name if self.copying is not None else "a checkpoint",
                    seconds,
                )
                return False
            self.thread = self.copying = None
        return True

    def delete_after(self, step: int, best: dict | None) -> None:
        """As in the first folder. What fails here is logged: a second folder must not end the run."""
        if self.target is None or not self.target.exists():
            return
        try:
            delete_after(self.target, step, best)
        except OSError as error:
            logger.error(
                "checkpoint.copy_to: what was saved after step %d could not be removed from %s: %s",
                step,
                self.target,
                error,
            )

    def _copy(self, source: Path) -> None:
        if (target := self.target) is None:
            return
        try:
            partial = target / (source.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            shutil.rmtree(target / source.name, ignore_errors=True)
            os.rename(partial, target / source.name)
            sync_folder(target)
            if (self.folder / "best.json").exists():
                write_atomically(target / "best.json", (self.folder / "best.json").read_text())
            write_atomically(target / "latest", source.name)
            prune(target, self.config, but=self.copying)
        except OSError as error:
            logger.error("checkpoint.copy_to: %s could not be copied to %s: %s", source.name, target, error)
