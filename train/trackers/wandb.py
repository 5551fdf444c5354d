"""W&B: <output>/<stage>/wandb, offline unless WANDB_MODE asks for more; `wandb sync` uploads it later."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from train.trackers.base import TRACKERS, RunInfo, Tracker

logger = logging.getLogger("soundwave")
PROJECT = "soundwave"  # where WANDB_PROJECT names none


@TRACKERS.register("wandb")
class WandB(Tracker):
    """The step is the metric `step`, the axis of all others: W&B's own counter refuses steps that a resumed
    run does again. Code, console output and system numbers are not recorded."""

    package = "wandb"

    @classmethod
    def new_run_id(cls) -> str:
        return secrets.token_hex(4)

    def __init__(self, run: RunInfo):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")  # compute nodes often have no network
        self.run_id = run.run_id
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            name=run.name,
            dir=str(run.folder),
            config=run.settings,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(
                console="off",
                save_code=False,
                disable_git=True,
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if mode == "offline":
            logger.info("W&B run %s is offline; upload it with: wandb sync %s", self.run_id, self.run.dir)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self.run.log({"step": step, name: wandb.Image(str(path))})

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        import wandb

        self.run.log({"step": step, name: wandb.Table(columns=list[str | int](columns), data=rows)})

    def close(self) -> None:
        self.run.finish()
