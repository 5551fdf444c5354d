"""Checkpoints from strangers: what a manifest or a state says is checked, and no file's code is run."""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.files import step_folders
from tests.hostile import damaged_bytes, is_one_line, json_documents, only_inside, write_json
from train.checkpoint.retention import best_step
from train.checkpoint.verification import saved_in_health, verify
from train.checkpoint.writer import BackgroundWriter
from train.deepspeed_fixes import safe_load

STATE = {
    "step": 5,
    "data_offset": 0,
    "best": {"step": 4, "by": "wer", "score": 0.5},
    "seed": 1,
    "facts": {"recipe": {"a": 1}},
    "health": {"norms": [1.0, 2.0], "consecutive": 0, "skipped": 0, "rollbacks": 0},
    "topology": {"world_size": 2, "zero_stage": 3},
}
many = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fact(path):
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000005"
    folder.mkdir(parents=True)
    write_json(folder / "state.json", STATE)
    torch.save({"module": {"weight": torch.ones(3)}}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "outside").write_text("x")
    seal(folder)
    assert verify(folder) is None
    return folder


def seal(folder):
    paths = [path for path in folder.iterdir() if path.name != "manifest.json"]
    write_json(folder / "manifest.json", {"files": {path.name: fact(path) for path in paths}})


def judged(folder):
    with only_inside(folder):
        told = verify(folder)
    assert told is None or (told and "\n" not in told and "\x1b" not in told), told
    assert saved_in_health(folder) in (True, False)
    return told


@many
@given(data=st.data())
def test_any_manifest_is_sound_or_named(checkpoint, data):
    kept = (checkpoint / "manifest.json").read_bytes()
    try:
        if data.draw(st.booleans()):
            write_json(checkpoint / "manifest.json", data.draw(json_documents(json.loads(kept))))
        else:
            (checkpoint / "manifest.json").write_bytes(data.draw(damaged_bytes(kept)))
        judged(checkpoint)
    finally:
        (checkpoint / "manifest.json").write_bytes(kept)


@many
@given(data=st.data())
def test_any_state_is_sound_or_named(checkpoint, data):
    """The hashes are right: somebody has written it like that."""
    write_json(checkpoint / "state.json", data.draw(json_documents(STATE)))
    seal(checkpoint)
    if judged(checkpoint) is None:
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["step"] == 5 and state["topology"]["world_size"] + state["data_offset"] >= 1
        assert all(isinstance(norm, (int, float)) for norm in state["health"]["norms"])
        assert state["best"] is None or state["best"]["step"] + state["best"]["score"] is not None


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda m: m["files"].update({"../../outside": {"size": 1, "sha256": "0" * 64}}),
            "manifest.json is a path, not a plain",
        ),
        (
            lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
            "manifest.json is a path, not a plain",
        ),
        (lambda m: m["files"].pop("state.json"), "manifest.json does not list state.json"),
        (lambda m: m.pop("files"), "manifest.json does not list state.json"),
        (
            lambda m: m["files"]["state.json"].update(size=-1),
            "manifest.json has an entry without size and sha256",
        ),
        (
            lambda m: m["files"]["state.json"].update(sha256=5),
            "manifest.json has an entry without size and sha256",
        ),
        (lambda m: m["files"]["state.json"].update(sha256="0" * 64), "state.json does not have its sha256"),
    ],
)
def test_manifests_that_are_refused(checkpoint, change, says):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    write_json(checkpoint / "manifest.json", manifest)
    assert judged(checkpoint).startswith(says)


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda s: s.update(step=6), "step"),
        (lambda s: s.update(step="5"), "step"),
        (lambda s: s.pop("data_offset"), "data_offset"),
        (lambda s: s["topology"].update(zero_stage=4), "topology"),
        (lambda s: s["health"].update(norms=[float("nan")]), "health"),
        (lambda s: s.update(best={"step": 1}), "best"),
        (lambda s: s.update(facts=[]), "facts"),
    ],
)
def test_states_that_are_refused(checkpoint, change, key):
    state = json.loads(json.dumps(STATE))
    change(state)
    write_json(checkpoint / "state.json", state)
    seal(checkpoint)
    assert judged(checkpoint) == f"state.json has no valid '{key}'"


def test_links_out_of_a_checkpoint_are_refused(checkpoint):
    model = checkpoint / "mp_rank_00_model_states.pt"
    shutil.move(model, checkpoint.parent / "elsewhere.pt")
    model.symlink_to("../elsewhere.pt")
    assert "mp_rank_00_model_states.pt is a link to" in judged(checkpoint)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": "x"}', '{"step": 1}', '{"step": -1, "score": 0.1}']
)
def test_a_broken_best_is_no_best(checkpoint, content):
    (checkpoint.parent / "best.json").write_text(content)
    assert best_step(checkpoint.parent) is None
    assert step_folders(checkpoint.parent) == [checkpoint]


# ------------------------------------------------------------------------------------------------ code


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_what_deepspeed_loads_is_data(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "x.pt"
    torch.save({"state": Evil(mark)}, path)
    for load in (
        TorchCheckpointEngine().load,
        BackgroundWriter().load,
        lambda p: torch.load(p, weights_only=False),
    ):
        with safe_load.data_only(), pytest.raises(pickle.UnpicklingError) as error:
            load(str(path))
        assert (
            safe_load.reason(error.value) == "it names posix.system, and so would run code when it is loaded"
        )
    assert not mark.exists() and safe_load.SWITCH not in os.environ
    path.write_bytes(pickle.dumps(Evil(mark)))  # another protocol, no archive
    with (
        safe_load.data_only(),
        pytest.warns(UserWarning, match="pickle protocol"),
        pytest.raises(pickle.UnpicklingError) as error,
    ):
        torch.load(path, weights_only=False)
    assert is_one_line(ValueError(safe_load.reason(error.value))) and not mark.exists()
    with pytest.raises(RuntimeError, match="Invalid magic number"):
        torch.load(path, weights_only=False)
    assert mark.exists(), "without it the code runs: the test means something"


def test_what_deepspeed_stores_is_allowed(tmp_path):
    state = {
        "scaler": LossScaler(2.0),
        "stage": ZeroStageEnum(3),
        "at": fragment_address(numel=4, start=8),
        "step": torch.ones(1),
        "shapes": [torch.Size([2, 3])],
    }
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    with safe_load.data_only():
        found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert found["scaler"].cur_scale == 2.0 and found["stage"] == 3 and found["at"] == state["at"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)  # and not allowed for ever


@pytest.mark.parametrize(
    "content, says",
    [
        ({"optimizer_state_dict": {"param_slice_mappings": [{"../../outside": torch.ones(1)}]}}, "is a path"),
        ({"module": {"/etc/x": 1}}, "is a path"),
        ({"a": ({"..": 1},)}, "is a path"),
        ({"a": Evil("/nowhere")}, "posix.system"),
    ],
)
def test_names_that_would_become_paths_are_not_converted(tmp_path, capsys, content, says):
    source, target = tmp_path / "step-000001", tmp_path / "step-000001" / "universal.partial"
    source.mkdir()
    torch.save(content, source / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    before = sorted(tmp_path.rglob("*"))
    assert safe_load.main(["--input_folder", str(source), "--output_folder", str(target)]) == 1
    output = capsys.readouterr().err
    assert says in output and output.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
