"""Trackers: the real packages offline, beside metrics.jsonl, and trackers that fail."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.distributed import Ranks
from core.files import read_lines
from recipe.config import LogConfig, RecipeError
from tests.train.tiny import workspace
from train import trackers
from train.telemetry import Telemetry
from train.trackers import TRACKERS, RunInfo, Tracker, Trackers, check_trackers, tracker_names

ALONE = Ranks(0, 1, 0, 1, "cpu")
NAMES = ["tensorboard", "wandb", "mlflow"]


def wandb_history(stage: Path) -> tuple[set[str], list[dict]]:
    """Run ids and history rows of a stage's offline runs, the first start first, by W&B's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    ids, rows = set(), []
    for file in sorted(stage.glob("wandb/offline-run-*/run-*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return ids, rows


def mlflow_client(output: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=(output / "mlruns").resolve().as_uri())


def logged(stage: Path, kind: str, name: str) -> dict[int, float]:
    lines = read_lines(stage / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if line["kind"] == kind}


@pytest.mark.slow  # two starts of a real rank
def test_all_trackers_show_the_numbers_of_metrics_jsonl_and_one_run_over_two_starts(
    server, tmp_path, monkeypatch
):
    """Four steps, a validation each two; the second start begins at the checkpoint of step 2."""
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    folder, output = workspace(tmp_path / "tiny"), tmp_path / "run"
    arguments = [
        folder / "stage1.yaml",
        f"output={output}",
        f"log.trackers=[{','.join(NAMES)}]",
        "log.every_steps=1",
        "log.validate_every_steps=2",
        "checkpoint.every_steps=2",
        "optim.steps=4",
    ]
    stage = output / "alignment"
    first = server.start([*arguments, "optim.steps=2"], ranks=1)
    assert first.wait() == [0], first.text()
    ids = json.loads((stage / "trackers.json").read_text())
    second = server.start([*arguments, "checkpoint.accept_changes=[recipe]"], ranks=1)
    assert second.wait() == [0], second.text()
    assert json.loads((stage / "trackers.json").read_text()) == ids and ids.keys() == {"wandb", "mlflow"}

    losses, wers = logged(stage, "train", "loss"), logged(stage, "valid", "wer")
    # metrics.jsonl drops the validation of step 2, where the second start begins; trackers still show it.
    assert sorted(losses) == [0, 1, 2, 3] and sorted(wers) == [0, 4]
    run_ids, rows = wandb_history(stage)
    assert run_ids == {ids["wandb"]}
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == losses
    shown = {row["step"]: row["valid/wer"] for row in rows if "valid/wer" in row}
    assert sorted(shown) == [0, 2, 4] and shown | wers == shown
    assert any("valid/clip" in key for row in rows for key in row)
    assert any("valid/samples" in key for row in rows for key in row)

    client = mlflow_client(output, monkeypatch)
    run = client.get_run(ids["mlflow"])
    assert run.info.status == "FINISHED" and run.data.params["optim.steps"] in ("2", "4")
    for name, expected in (("train/loss", losses), ("valid/wer", shown)):
        history = client.get_metric_history(ids["mlflow"], name)
        assert {metric.step: metric.value for metric in history} == expected
    pictures = [item.path for item in client.list_artifacts(ids["mlflow"], "valid/clip")]
    assert f"valid/clip/step-{4:06d}.png" in pictures
    table = Path(client.download_artifacts(ids["mlflow"], "valid/samples/step-000004.json"))
    assert json.loads(table.read_text())["columns"] == ["reference", "hypothesis"]

    board = EventAccumulator(str(stage / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx(losses, rel=1e-6), "TensorBoard stores fp32"


# ---- trackers that fail


class Toy(Tracker):
    package = "json"
    run_id = "toy-1"

    def __init__(self, run: RunInfo):
        self.given = run
        SEEN.append(("start", run.run_id))

    def scalars(self, step, values):
        SEEN.append((step, values))

    def picture(self, step, name, path):
        raise ValueError("no pictures here")

    def table(self, step, name, columns, rows):
        SEEN.append((step, columns, rows))

    def close(self):
        SEEN.append("close")


class Absent(Toy):
    def __init__(self, run):
        raise SystemExit("no login")


class Stuck(Toy):
    def scalars(self, step, values):
        RELEASE.wait(60)


class Missing(Toy):
    package = "a_package_that_nobody_has"


SEEN: list = []
RELEASE = threading.Event()


@pytest.fixture
def toys():
    SEEN.clear()
    RELEASE.clear()
    for name, kind in (("toy", Toy), ("absent", Absent), ("stuck", Stuck), ("missing", Missing)):
        TRACKERS.add(name, kind)
    yield
    RELEASE.set()
    for name in ("toy", "absent", "stuck", "missing"):
        TRACKERS.remove(name)


def test_a_registered_tracker_gets_numbers_and_its_own_run_id(toys, tmp_path):
    for start in (0, 4):
        log = Telemetry(tmp_path, ALONE, first_step=start, steps=9, stage="test", trackers=["toy"])
        log.scalars("train", start, {"loss": 1.5, "skipped": "a reason", "flag": True})
        log.table("valid/samples", start, ["a"], [["b"]])
        log.close()
    numbers = {"train/loss": 1.5}
    one = [(0, numbers), (0, ["a"], [["b"]]), "close"]
    two = [(4, numbers), (4, ["a"], [["b"]]), "close"]
    assert [("start", None), *one, ("start", "toy-1"), *two] == SEEN
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"toy": "toy-1"}


def test_a_tracker_that_fails_or_hangs_does_not_delay_the_others(toys, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers.feed, "CLOSING_SECONDS", 0.5)
    logging.getLogger("soundwave").propagate = True
    both = Trackers(["absent", "stuck", "toy"], RunInfo(tmp_path, "run"))
    for step in range(5):
        both.scalars(step, "train", {"loss": 1.0})
        both.picture(step, "clip", tmp_path / "none.png")
    began = time.monotonic()
    both.close()
    assert time.monotonic() - began < 5
    text = caplog.text
    assert "tracker absent does not start (no login): training continues" in text
    assert text.count("tracker toy: picture failed (no pictures here)") == 3, "then it is left out"
    assert "tracker toy records nothing more in this process" in text
    assert "tracker stuck does not end" in text


def test_damaged_ids_start_new_runs(toys, tmp_path):
    for damaged in ("{", "[1]", '{"toy": 5}'):
        (tmp_path / "trackers.json").write_text(damaged)
        Trackers(["toy"], RunInfo(tmp_path, "run")).close()
    assert [entry for entry in SEEN if entry[0] == "start"] == [("start", None)] * 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["missing"], "missing needs the package a_package_that_nobody_has, which is not installed: "),
        (["tensorbord"], "tracker 'tensorbord' is not known; did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line(toys, given, words):
    with pytest.raises(RecipeError) as caught:
        check_trackers(LogConfig(trackers=given))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_old_key_leaves_tensorboard_out():
    assert tracker_names(LogConfig()) == ["tensorboard"]
    assert tracker_names(LogConfig(tensorboard=False)) == []
    assert tracker_names(LogConfig(trackers=["wandb", "wandb", "tensorboard"], tensorboard=False)) == [
        "wandb"
    ]
    assert tracker_names(LogConfig(trackers=[])) == []
