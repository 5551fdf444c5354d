"""MLflow: files in <output>/mlruns, unless MLFLOW_TRACKING_URI names a server."""

from __future__ import annotations

import os
import time
from pathlib import Path

from train.trackers.base import TRACKERS, RunInfo, Tracker

EXPERIMENT = "soundwave"  # where MLFLOW_EXPERIMENT_NAME names none
LONGEST_VALUE = 500  # characters of a parameter that every store takes


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    package = "mlflow"

    def __init__(self, run: RunInfo):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (run.folder.parent / "mlruns").resolve().as_uri()
            # mlflow 3 asks for this before it uses files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.client = MlflowClient(tracking_uri=uri)
        if run.run_id:
            try:
                self.client.update_run(run.run_id, status="RUNNING")
                self.run_id: str = run.run_id
                return
            except MlflowException:  # the store is another one, or was removed
                pass
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        existing = self.client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self.client.create_experiment(name)
        self.run_id = self.client.create_run(experiment, run_name=run.name).info.run_id
        settings = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in _flat(run.settings).items()]
        for start in range(0, len(settings), 100):  # the most in one request
            self.client.log_batch(self.run_id, params=settings[start : start + 100])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(
            self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()]
        )

    def picture(self, step: int, name: str, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path), name)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        data = {"columns": columns, "data": rows}
        self.client.log_dict(self.run_id, data, f"{name}/step-{step:06d}.json")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
