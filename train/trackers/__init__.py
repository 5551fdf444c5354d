"""Where a run's numbers, pictures and tables are shown, beside metrics.jsonl: one file a tracker.

    tensorboard   tensorboard.py   <output>/<stage>/tensorboard
    wandb         wandb.py         W&B, offline by default
    mlflow        mlflow.py        MLflow, in <output>/mlruns by default

`log.trackers` names them; a new one is a file that the recipe's `plugins` names (docs/extending.md).
"""

from train.trackers.base import TRACKERS, RunInfo, Tracker, check_trackers, tracker_names
from train.trackers.feed import Trackers
from train.trackers.mlflow import MLflow
from train.trackers.tensorboard import TensorBoard
from train.trackers.wandb import WandB

__all__ = [
    "TRACKERS",
    "MLflow",
    "RunInfo",
    "TensorBoard",
    "Tracker",
    "Trackers",
    "WandB",
    "check_trackers",
    "tracker_names",
]
