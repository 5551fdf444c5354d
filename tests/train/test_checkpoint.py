"""Checkpoints by themselves, one rank: what the writer's thread may not hide, what a roll-back leaves, whose
counter is whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from core.distributed import Ranks, remove_shared_memory
from core.files import step_folders
from model.stages import ALIGNMENT
from recipe import stages
from recipe.config import CheckpointConfig, Recipe, RecipeError
from tests.train.tiny import workspace
from train import setup, stage_run, trainer
from train.checkpoint import compatibility, retention, store, verification, writer
from train.checkpoint.store import Checkpoints
from train.deepspeed_fixes.optimizer import untie_step_counters
from train.outcome import RunStatus
from train.trainer import Progress, Trainer


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoints(tmp_path: Path, **settings) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**settings), Ranks(0, 1, 0, 1, "cpu"))


def write(to: Checkpoints, step: int, best: dict | None = None, **more) -> bool:
    """What `save` and `finish` do, without DeepSpeed: two files and the state."""
    to.target = to.folder / f"step-{step:06d}.partial"
    to.target.mkdir()
    health = {"norms": [], "consecutive": 0, "skipped": 0, "rollbacks": 0, **more.pop("health", {})}
    state = {
        "step": step,
        "data_offset": 0,
        "best": best,
        "health": health,
        "facts": {},
        "topology": {"world_size": 1, "zero_stage": 3},
        **more,
    }
    (to.target / "state.json").write_text(json.dumps(state))
    for name in ("one.pt", "two.pt"):
        to.writer.save({"step": torch.tensor(step)}, str(to.target / name))
    to.writer.start()
    return to.finish()


def names(folder: Path) -> list[str]:
    return [path.name for path in reversed(step_folders(folder))]


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    "error, told",
    [
        (MemoryError(), "needs more memory than there is"),
        (OSError("disk full"), "disk full"),
        (SystemExit(1), "1"),
    ],
)
def test_whatever_ends_the_writer_the_checkpoint_does_not_count(tmp_path, monkeypatch, caplog, error, told):
    to, save = checkpoints(tmp_path, keep_last=1), torch.save
    assert write(to, 1)

    def fails(state, file):
        if file.file.name.endswith("two.pt"):
            raise error
        save(state, file)

    monkeypatch.setattr(writer.torch, "save", fails)
    assert not write(to, 2)
    assert f"step-000002 could not be written (rank 0: {told})" in caplog.text
    assert names(to.folder) == ["step-000001"] and (to.folder / "latest").read_text() == "step-000001"
    assert not list(to.folder.glob("*.partial"))
    monkeypatch.undo()
    assert write(to, 2) and names(to.folder) == ["step-000002"]


def test_a_queued_file_that_was_not_written_is_missed(tmp_path, monkeypatch, caplog):
    to = checkpoints(tmp_path)
    monkeypatch.setattr(writer.threading.Thread, "run", lambda self: None)
    assert not write(to, 1)
    assert "not written: one.pt, two.pt" in caplog.text and names(to.folder) == []


def test_a_damaged_checkpoint_does_not_block_the_next_save(tmp_path, caplog):
    to = checkpoints(tmp_path, keep_last=3)
    assert all(write(to, step) for step in (500, 900, 1000))
    (to.folder / "step-001000" / "one.pt").write_bytes(b"rot")
    (to.folder / "step-000900" / "manifest.json").write_text("")
    assert verification.find_good([to.folder], to.ranks) == to.folder / "step-000500"
    assert "step-001000 is damaged (one.pt has 3 bytes instead of" in caplog.text
    assert "set aside as step-000900.damaged" in caplog.text
    to.config.keep_last = 1
    for step in (600, 700):
        assert write(to, step) and names(to.folder) == [f"step-{step:06d}"]
    assert verification.find_good([to.folder], to.ranks) == to.folder / "step-000700"
    assert (to.folder / "step-001000.damaged" / "two.pt").exists(), "left for eyes"


def test_a_checkpoint_that_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    to, read = checkpoints(tmp_path), verification.sha256_of
    assert write(to, 1) and write(to, 2)

    def fails(path):
        if path.name == "two.pt" and path.parent.name == "step-000002":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(verification, "sha256_of", fails)
    assert "two.pt cannot be read: [Errno 5]" in verification.verify(to.folder / "step-000002")
    assert verification.find_good([to.folder], to.ranks) == to.folder / "step-000001"


def test_the_room_for_a_save_is_measured_on_a_checkpoint_that_can_be_read(tmp_path):
    to = checkpoints(tmp_path)
    assert write(to, 1) and write(to, 2)
    sizes = json.loads((to.folder / "step-000001" / "manifest.json").read_text())["files"].values()
    (to.folder / "step-000002" / "manifest.json").write_text("{")
    engine = SimpleNamespace(module=torch.nn.Linear(10, 10), zero_optimization_stage=lambda: 2)
    assert to._needed_bytes(engine) == int(1.05 * sum(fact["size"] for fact in sizes))
    (to.folder / "step-000001" / "manifest.json").unlink()
    assert to._needed_bytes(engine) == int(1.05 * 16 * 110)


def test_a_disk_that_takes_nothing_more_leaves_training_alone(tmp_path, monkeypatch, caplog):
    to = checkpoints(tmp_path)

    def full(*_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(store, "write_atomically", full)
    engine = SimpleNamespace(module=torch.nn.Linear(1, 1), zero_optimization_stage=lambda: 2)
    assert not to.save(engine, {"step": 1}) and "Disk quota exceeded" in caplog.text
    assert not list(to.folder.iterdir())


def test_an_old_checkpoint_that_cannot_be_removed_does_not_spoil_the_new_one(tmp_path, monkeypatch, caplog):
    to, remove = checkpoints(tmp_path, keep_last=1), retention.shutil.rmtree
    assert write(to, 1)

    def held(path, **options):
        if not options:
            raise OSError(39, "Directory not empty")
        remove(path, **options)

    monkeypatch.setattr(retention.shutil, "rmtree", held)
    assert (
        write(to, 2)
        and names(to.folder) == ["step-000002"]
        and "step-000001 could not be removed" in caplog.text
    )
    monkeypatch.undo()
    checkpoints(tmp_path)
    assert [path.name for path in to.folder.iterdir() if path.is_dir()] == ["step-000002"], (
        "gone at the next start"
    )


def test_the_last_checkpoint_from_before_a_bad_stretch_is_kept(tmp_path):
    to = checkpoints(tmp_path, keep_last=1)
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2)):
        assert write(to, step, health={"consecutive": skipped})
    assert names(to.folder) == ["step-000002", "step-000004"]
    assert write(to, 5, health={"consecutive": 0}) and names(to.folder) == ["step-000005"]


def test_a_second_file_system_that_hangs_holds_nothing_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store, "COPY_SECONDS", 0.1)
    (tmp_path / "copies" / "step-000001.partial").mkdir(parents=True)
    to, go_on = checkpoints(tmp_path, copy_to=str(tmp_path / "copies")), threading.Event()
    assert not list((tmp_path / "copies").iterdir()), "what a kill left there"
    copy = to.mirror._copy
    monkeypatch.setattr(to.mirror, "_copy", lambda source: (go_on.wait(), copy(source)))
    to.config.keep_last = 1
    assert write(to, 1) and write(to, 2) and "has not taken step-000001 in 0 s" in caplog.text
    assert names(to.folder) == ["step-000001", "step-000002"], "what is being copied stays"
    go_on.set()
    to.mirror.thread.join()
    assert write(to, 3)
    go_on.clear()
    threading.Timer(0.5, go_on.set).start()
    assert to.close() and names(tmp_path / "copies") == ["step-000003"], "the last one has time"
    go_on.clear()
    assert write(to, 4) and to.close(hurry=True) and names(tmp_path / "copies") == ["step-000003"], (
        "unless there is none"
    )
    go_on.set()


# ------------------------------------------------------------------------------------------------ roll-back


def test_a_roll_back_reaches_the_copies_too(tmp_path, monkeypatch):
    copies = tmp_path / "copies"
    to = checkpoints(tmp_path, keep_last=2, copy_to=str(copies))
    for step in (550, 600, 700):
        assert write(to, step)
    assert to.close() and names(copies) == ["step-000600", "step-000700"]
    to.delete_after(600, None)
    for folder in (to.folder, copies):
        assert names(folder) == ["step-000600"] and (folder / "latest").read_text() == "step-000600"
    copy = to.mirror._copy
    monkeypatch.setattr(to.mirror, "_copy", lambda source: (time.sleep(0.2), copy(source)))
    assert write(to, 650)
    to.delete_after(600, None)  # while 650 is being copied
    assert names(copies) == ["step-000600"] and (copies / "latest").read_text() == "step-000600"
    for step in (610, 620):
        assert write(to, step)
    assert (
        to.close()
        and names(copies) == ["step-000610", "step-000620"]
        and (copies / "latest").read_text() == "step-000620"
    )


def test_latest_of_copies_that_lack_the_step_names_what_is_there(tmp_path):
    copies = tmp_path / "copies"
    to = checkpoints(tmp_path)
    assert write(to, 1)
    to.config.copy_to = str(copies)
    assert write(to, 2) and to.close()
    to.delete_after(1, None)
    assert names(copies) == [] and not (copies / "latest").exists()


def test_the_best_goes_back_with_the_weights(tmp_path):
    copies, old = tmp_path / "copies", {"step": 1, "score": 0.3}
    to = checkpoints(tmp_path, keep_last=2, copy_to=str(copies))
    for step in (1, 2, 3):
        assert write(to, step, old)
    assert names(to.folder) == ["step-000001", "step-000002", "step-000003"]
    to.config.keep_last = 9
    assert write(to, 4, {"step": 4, "score": 0.2})
    assert to.delete_after(3, old) == old
    assert all(json.loads((folder / "best.json").read_text()) == old for folder in (to.folder, copies))
    to.config.keep_last = 2
    assert write(to, 5, {"step": 5, "score": 0.1}) and names(to.folder) == ["step-000003", "step-000005"]
    assert to.delete_after(3, old) is None, (
        "its checkpoint went for step 5's: the next score is the best of those that are kept"
    )
    assert not any((folder / "best.json").exists() for folder in (to.folder, copies))
    assert write(to, 6, {"step": 6, "score": 0.4}) and write(to, 7) and write(to, 8) and to.close()
    assert names(to.folder) == names(copies) == ["step-000006", "step-000007", "step-000008"]
    to.config.keep_best = False
    assert to.delete_after(8, old) == old, "where the best is not kept it is only told"


def test_a_stage_that_another_process_trains_is_left_to_it(tmp_path, caplog):
    recipe = Recipe(output=str(tmp_path))
    (tmp_path / "alignment").mkdir()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "train/run.py"])
    try:
        ranks = Ranks(0, 1, 0, 1, "cpu")
        noted = tmp_path / "alignment" / "run.json"
        noted.write_text(
            text := json.dumps(
                {
                    "status": "running",
                    "pid": other.pid,
                    "host": os.uname().nodename,
                    "updated": time.time() + 1,
                }
            )
        )
        assert abs(stages.began(other.pid) - time.time()) < 5
        stage_run.logger.propagate = True
        assert stage_run.run_stage(recipe, ranks, RunStatus(recipe, ranks)) == 2 and noted.read_text() == text
        assert f"process {other.pid} of this machine is training {tmp_path / 'alignment'}" in caplog.text
        for change in ({"host": "elsewhere"}, {"status": "preempted"}, {"updated": time.time() - 3600}):
            noted.write_text(json.dumps(json.loads(text) | change))
            assert stages.trained_by(recipe) is None, change
        noted.write_text(json.dumps({"status": "running", "pid": os.getpid(), "host": os.uname().nodename}))
        assert stages.trained_by(recipe) is None, (
            "this one, and whatever else has the number of one that died"
        )
    finally:
        other.kill()
        other.wait()


def trainer_of(recipe: Recipe, monkeypatch, **parts) -> Trainer:
    """A Trainer of parts that do nothing, but for those that are given."""
    monkeypatch.setattr(trainer, "Meter", lambda *a: None)
    silent = SimpleNamespace(line=lambda *a: None, scalars=lambda *a: None, go_back=lambda step: None)
    monkeypatch.setattr(trainer, "Telemetry", lambda *a, **k: silent)
    unused = dict.fromkeys(("plan", "row_limit", "checkpoints", "validation", "status", "preemption"))
    engine = SimpleNamespace(model=SimpleNamespace(tokenizer=None), average=None, averaged=nullcontext)
    given = {"engine": engine, "topology": {}, "facts": {}, "progress": Progress(), **unused, **parts}
    return Trainer(recipe, Ranks(0, 1, 0, 1, "cpu"), **given)


def test_a_roll_back_takes_the_best_back(tmp_path, monkeypatch):
    source, old = tmp_path / "step-000002", {"step": 2, "score": 0.3}
    health = SimpleNamespace(rollbacks=0, skipped=1, load=lambda state: None)
    made = trainer_of(
        Recipe(output=str(tmp_path)),
        monkeypatch,
        engine=SimpleNamespace(health=health, deepspeed=None, model=None, average=None),
        checkpoints=SimpleNamespace(
            folder=tmp_path,
            finish=lambda: True,
            load=lambda *a: None,
            load_average=lambda *a: None,
            delete_after=lambda step, best: best,
        ),
        progress=Progress(step=5, best={"step": 3, "score": 0.2}),
    )
    at = made.progress
    best_model = tmp_path / "alignment" / "model-best"
    best_model.mkdir(parents=True)
    described = {"config": {}, "stage": "alignment", "frozen": {}}
    (best_model / "soundwave.json").write_text(json.dumps({**described, "step": 2}))
    monkeypatch.setattr(trainer, "find_good", lambda *a, **k: source)
    monkeypatch.setattr(
        trainer, "read_state", lambda folder: {"step": 2, "best": old, "topology": {}, "health": {}}
    )
    assert made._roll_back() and (at.step, at.best, at.data_offset) == (2, old, 3) and best_model.exists()
    (best_model / "soundwave.json").write_text(json.dumps({**described, "step": 3}))
    at.step, health.rollbacks = 5, 0
    assert made._roll_back() and not best_model.exists(), "the best model of steps that are done again"
    made.recipe.checkpoint.best_by, at.step, health.rollbacks = "loss", 5, 0
    assert made._roll_back() and at.best is None, "chosen by another score"
    health.rollbacks = made.recipe.health.max_rollbacks
    assert not made._roll_back(), "used up"


@pytest.mark.parametrize("by, bests", [("wer", [1, 2, 2, 4]), ("loss", [1, 1, 3, 3])])
def test_the_best_is_chosen_by_the_recipes_score(by, bests, tmp_path, monkeypatch):
    recipe = Recipe(output=str(tmp_path))
    recipe.checkpoint.best_by = by
    made = trainer_of(recipe, monkeypatch)
    at = made.progress
    scores = {0: (0.1, 0.1), 1: (0.5, 3.0), 2: (0.4, float("nan")), 3: (0.4, 2.0), 4: (0.3, 2.5)}
    for step, (wer, loss) in scores.items():
        result = {"wer": wer, "loss": loss, "samples": [], "clip": None}
        monkeypatch.setattr(trainer, "validate", lambda *a, result=result: dict(result))
        at.step, before = step, at.best
        assert made.validate() == (at.best != before)
        assert (at.best is None) == (step == 0), "the untrained model is no candidate"
        if step:
            wer, loss = scores[bests[step - 1]]
            score = loss if by == "loss" else wer
            assert at.best == pytest.approx(
                {"step": bests[step - 1], "by": by, "score": score, "loss": loss}, nan_ok=True
            )


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "group, place", [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({"fused": None}, "cpu")]
)
def test_counters_lie_where_the_optimizer_wants_them_one_each(group, place):
    shared = torch.tensor(7.0)
    parameters = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2)]
    optimizer = SimpleNamespace(param_groups=[group], state={p: {"step": shared} for p in parameters})
    untie_step_counters(optimizer)
    one, two = (optimizer.state[p]["step"] for p in parameters)
    assert one.device.type == two.device.type == place and one is not two is not shared
    if place == "cpu":
        one += 1
        assert (float(one), float(two), float(shared)) == (8, 7, 7)


def test_activation_checkpointing_may_change_behind_a_checkpoint():
    """Also behind one that was made when it might not: such a checkpoint has noted it."""
    plain, saving = Recipe(), Recipe()
    saving.optim.activation_checkpointing = True
    facts = [
        {
            "base": {},
            "settings": {},
            "tokenizer": "",
            "recipe": compatibility.recipe_facts(recipe),
            "index": "",
            "code": "",
        }
        for recipe in (plain, saving)
    ]
    assert compatibility.check(*facts, [], Path("step-000001")) == []
    facts[0]["recipe"]["optim.activation_checkpointing"] = False
    assert compatibility.check(*facts, [], Path("step-000001")) == []
    facts[0]["recipe"]["optim.lr_adapters"] = 1.0
    with pytest.raises(RecipeError, match=r"another recipe \(optim.lr_adapters: 1.0 -> 0.001\)"):
        compatibility.check(*facts, [], Path("step-000001"))


# ------------------------------------------------------------------------------------------------ start and e


def test_models_that_hold_a_language_model_tell_its_width(monkeypatch):
    """Gemma 3 with its vision tower: the sizes lie one level down."""
    from transformers import Gemma3Config

    class Enough(Exception):
        pass

    def resolve(recipe, hidden_size):
        raise Enough(hidden_size)

    config = Gemma3Config(text_config={"hidden_size": 48, "num_hidden_layers": 1})
    monkeypatch.setattr(setup, "locate", lambda *a, **k: SimpleNamespace(config=config))
    monkeypatch.setattr(setup.deepspeed_config, "resolve", resolve)
    with pytest.raises(Enough, match="48"):
        setup.resolve_sizes(Recipe(), ALIGNMENT)


def test_a_failed_last_checkpoint_is_reported_and_the_model_is_written(server, tmp_path):
    tiny = workspace(tmp_path)
    run = server.start(
        [
            tiny / "stage1.yaml",
            "optim.steps=2",
            "checkpoint.every_steps=1",
            "data.valid=[]",
            "log.tensorboard=false",
        ],
        ranks=1,
        fault=["no_memory_to_save", 2],
    )
    codes, text = run.wait(), run.text()
    folder = tiny / "run" / "alignment"
    assert (
        codes == [1]
        and "checkpoint step-000002 could not be written (rank 0: needs more memory than there is)" in text
    ), text
    noted = json.loads((folder / "run.json").read_text())
    assert (noted["status"], noted["step"], noted["exit_code"]) == ("failed", 2, 1)
    assert noted["reason"].startswith("the checkpoint of the last step, 2, could not be written")
    assert (folder / "model" / "soundwave.json").exists() and names(folder / "checkpoints") == ["step-000001"]
    run = server.start(
        [
            tiny / "stage1.yaml",
            "optim.steps=2",
            "checkpoint.every_steps=1",
            "data.valid=[]",
            "log.tensorboard=false",
        ],
        ranks=1,
    )
    codes, text = run.wait(), run.text()
    assert codes == [0] and "resuming at step 1" in text, text


def test_a_stop_while_features_are_computed(server, tmp_path):
    """All ranks leave together with exit code 85, and the next start computes only what is missing."""
    tiny = workspace(tmp_path)
    arguments = [
        tiny / "stage1.yaml",
        "optim.steps=1",
        "data.valid=[]",
        "log.tensorboard=false",
        f"data.cache_features={tmp_path / 'features'}",
    ]
    run = server.start(arguments, ranks=2, fault=["stop_after_pack", "SIGTERM", 1])
    codes, text = run.wait(), run.text()
    assert (
        codes == [85, 85]
        and "stopped while encoder features were computed (SIGTERM on rank 1), exit code 85" in text
    ), text
    noted = json.loads((tiny / "run" / "alignment" / "run.json").read_text())
    assert (noted["status"], noted["exit_code"]) == ("preempted", 85)
    packs = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.index.npy")}
    assert packs
    run = server.start(arguments, ranks=2)
    codes, text = run.wait(), run.text()
    assert codes == [0, 0], text
    assert all(path.stat().st_mtime_ns == made for path, made in packs.items())
    assert len(list((tmp_path / "features").rglob("*.index.npy"))) > len(packs)


def test_a_rank_takes_its_shared_memory_along(monkeypatch):
    """Which DeepSpeed leaves behind."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(os.getpid())), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    left = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.getpid()}_1")
    left.touch()
    remove_shared_memory()
    assert not left.exists()
    remove_shared_memory()
