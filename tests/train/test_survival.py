"""Training that is interrupted, moved, damaged or fed rubbish: what it says, and that it ends where the
undisturbed run ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipe.config import load_recipe
from stream import Plan
from tests.model import tiny as tiny_models
from tests.train.soak import soak
from tests.train.tiny import STAGES, losses, weights, workspace
from train.checkpoint.verification import sha256_of
from train.preemption import Preemption

OPTIONS = ["optim.steps=8", "checkpoint.every_steps=2", "data.valid=[]", "log.tensorboard=false"]
COMPARABLE = [
    "model.llm.lora_dropout=0.1",
    "checkpoint.keep_last=9",
]  # all dropout on (the adapters' is by default)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return workspace(tmp_path_factory.mktemp("survival"))


def train(server, tiny, output, *options, stage: int = 1, **how) -> tuple[list[int], str]:
    run = server.start([tiny / f"stage{stage}.yaml", f"output={output}", *OPTIONS, *options], **how)
    return run.wait(), run.text()


def stop_after(server, tiny, output, step, *options, ranks: int = 2, **how) -> None:
    codes, text = train(
        server, tiny, output, *options, ranks=ranks, fault=["signal_after", step, "SIGTERM", ranks - 1], **how
    )
    assert (
        codes == [85] * ranks
        and f"stopped before step {step + 1} (SIGTERM on rank {ranks - 1}), saved" in text
    ), text
    assert "</html>" in (output / STAGES[how.get("stage", 1)] / "report.html").read_text()


@pytest.fixture(scope="module")
def whole(server, tiny) -> Path:
    """Stage 1, undisturbed, two ranks under ZeRO-3."""
    codes, text = train(server, tiny, tiny / "whole")
    assert codes == [0, 0], text
    return tiny / "whole"


def metrics(output: Path, kind: str = "train", stage: str = "alignment") -> list[dict]:
    return [
        line
        for line in map(json.loads, (output / stage / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == kind
    ]


def loss_curve(output: Path, stage: str = "alignment") -> torch.Tensor:
    found = losses(output / stage)
    return torch.tensor([found[step] for step in sorted(found)], dtype=torch.float64)


def assert_same_end(one: Path, two: Path, stage: str = "alignment") -> None:
    ours, theirs = weights(one / stage), weights(two / stage)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(one / stage) == losses(two / stage)


def assert_close_end(one: Path, two: Path, stage: str = "alignment") -> None:
    """The same numbers but for the rounding of sums."""
    torch.testing.assert_close(loss_curve(one, stage), loss_curve(two, stage), rtol=1e-6, atol=0)
    ours, theirs = weights(one / stage), weights(two / stage)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            without_key_bias(name, ours[name]), without_key_bias(name, theirs[name]), rtol=1e-4, atol=2e-5
        )


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Leave out the bias of attention's keys: it has no gradient but rounding, which Adam scales up."""
    if name.endswith("qkv.bias"):
        return tensor.unflatten(0, (3, -1))[[0, 2]]
    if name.endswith("key_value.bias"):
        return tensor.unflatten(0, (2, -1))[1]
    return tensor


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.slow  # several starts of real ranks
def test_damaged_checkpoint_is_passed_over_with_a_line(server, tiny, whole, tmp_path):
    stop_after(server, tiny, tmp_path, 4)
    newest = tmp_path / "alignment" / "checkpoints" / "step-000005"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    codes, text = train(server, tiny, tmp_path)
    assert codes == [0, 0]
    assert (
        f"checkpoint {newest} is damaged ({largest.name} does not have its sha256): it is set aside as "
        f"{newest.name}.damaged, and the one before it is taken"
    ) in text
    assert f"resuming at step 4 from {newest.with_name('step-000004')}" in text
    assert_same_end(tmp_path, whole)


@pytest.mark.slow  # two starts of a real rank
def test_code_in_a_checkpoint_is_not_run(server, tiny, tmp_path):
    """Its hashes are right, as those of whoever made it."""
    stop_after(server, tiny, tmp_path, 2, ranks=1)
    folder = tmp_path / "alignment" / "checkpoints" / "step-000003"
    for path in folder.glob("*.pt"):
        torch.save({"module": MarkFile(tmp_path / "ran")}, path)
    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"files": manifest}))
    codes, text = train(server, tiny, tmp_path, ranks=1)
    assert codes == [1] and "it names posix.system, and so would run code when it is loaded" in text
    assert "Traceback" not in text and not (tmp_path / "ran").exists()


class MarkFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.slow  # several starts of real ranks
def test_copies_serve_where_the_first_folder_is_lost(server, tiny, whole, tmp_path):
    copies, folder = tmp_path / "copies", tmp_path / "alignment" / "checkpoints"
    stop_after(server, tiny, tmp_path, 4, f"checkpoint.copy_to={copies}")
    assert {p.name for p in copies.glob("step-*")} == {"step-000004", "step-000005"}
    assert (copies / "latest").read_text() == "step-000005"
    shutil.rmtree(folder)
    codes, text = train(server, tiny, tmp_path, f"checkpoint.copy_to={copies}")
    assert codes == [0, 0] and f"resuming at step 5 from {copies / 'step-000005'}" in text
    assert_same_end(tmp_path, whole)


@pytest.mark.long  # two runs of two ranks
def test_complete_checkpoint_that_only_lacks_its_name_counts(server, tiny, tmp_path):
    stop_after(server, tiny, tmp_path, 2, ranks=1)
    done = tmp_path / "alignment" / "checkpoints" / "step-000003"
    done.rename(done.with_name("step-000003.partial"))
    (done.with_name("step-000009.partial")).mkdir()
    codes, text = train(server, tiny, tmp_path, ranks=1)
    assert codes == [0] and f"resuming at step 3 from {done}" in text
    assert not list(done.parent.glob("*.partial"))


def test_best_and_last_are_kept(server, tiny, tmp_path):
    codes, text = train(
        server,
        tiny,
        tmp_path,
        f"data.valid=[{{shards: {tiny / 'valid'}}}]",
        "log.validate_every_steps=2",
        "checkpoint.keep_last=1",
        ranks=1,
    )
    assert codes == [0], text
    lines = [line for line in metrics(tmp_path, "valid") if line["step"] > 0]
    scores = {line["step"]: line["wer"] for line in lines}
    losses = {line["step"]: line["loss"] for line in lines}
    best = min(scores, key=lambda step: (scores[step], losses[step], step))
    folder = tmp_path / "alignment" / "checkpoints"
    found = json.loads((folder / "best.json").read_text())
    assert (found["step"], found["by"], found["score"]) == (best, "wer", scores[best])
    assert {p.name for p in folder.glob("step-*")} == {f"step-{best:06d}", "step-000008"}


@pytest.mark.slow  # several starts of real ranks
def test_full_disk_is_found_before_writing(server, tiny, whole, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        (small / "ballast").write_bytes(bytes(250 * 1024))
        (tmp_path / "alignment").mkdir()
        (tmp_path / "alignment" / "checkpoints").symlink_to(small)
        codes, text = train(server, tiny, tmp_path, fault=["signal_after", 5, "SIGTERM", 0])
        assert (
            codes == [1, 1]
            and f"no room for a checkpoint in {tmp_path / 'alignment' / 'checkpoints'}: it needs" in text
        )
        assert "stopped before step 6 (SIGTERM on rank 0), NOT saved" in text
        assert not list(small.glob("step-*"))
        codes, text = train(server, tiny, tmp_path)
        assert codes == [0, 0] and "training continues without" in text
        assert_same_end(tmp_path, whole)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------------ resume


def other_tokenizer(llm: Path, folder: Path) -> Path:
    shutil.copytree(llm, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow  # several starts of real ranks
def test_another_recipe_base_or_tokenizer_is_named_with_its_switch(server, tiny, tmp_path):
    stop_after(server, tiny, tmp_path, 3, ranks=1)
    torch.manual_seed(7)
    changes = {
        "recipe": ("optim.lr_adapters=0.01", "optim.lr_adapters: 0.001 -> 0.01"),
        "base": (f"model.encoder.name={tiny_models.whisper(tmp_path / 'other')}", "encoder: "),
        "tokenizer": (f"model.llm.name={other_tokenizer(tiny / 'llm', tmp_path / 'llm')}", "tokenizer: "),
    }
    for kind, (change, told) in changes.items():
        codes, text = train(server, tiny, tmp_path, change, ranks=1)
        assert codes == [2] and f"step-000004 was made with another {kind} ({told}" in text, text
        assert f"accept it with checkpoint.accept_changes=[{kind}]" in text
        noted = (tmp_path / "alignment" / "recipe.yaml").read_text()
        assert "lr_adapters: 0.001\n" in noted, "a recipe that was refused is not noted"
    codes, text = train(
        server, tiny, tmp_path, changes["recipe"][0], "checkpoint.accept_changes=[recipe]", ranks=1
    )
    assert codes == [0] and "recipe has changed and is accepted: optim.lr_adapters: 0.001 -> 0.01" in text
    rates = {line["step"]: line["lr_adapters"] for line in metrics(tmp_path)}
    assert rates[4] > 5 * rates[3], "an accepted rate is the one that is used"


@pytest.mark.slow  # several starts of real ranks
@pytest.mark.parametrize(
    ("options", "alike"),
    [
        pytest.param(
            ["deepspeed=ds_configs/zero1.json", "model.dtype=bfloat16"],
            assert_same_end,
            id="bf16-zero1",
            marks=pytest.mark.long,
        ),
        # DeepSpeed's CPU Adam keeps the powers of its betas as running products; after a resume it begins
        # with the power itself.
        pytest.param(
            ["deepspeed=ds_configs/zero3_offload.json"],
            assert_close_end,
            id="offload",
            marks=pytest.mark.long,
        ),
        pytest.param(["model.dtype=bfloat16"], assert_same_end, id="bf16-zero3"),
    ],
)
def test_a_stopped_run_ends_as_an_undisturbed_one_under(server, tiny, whole, tmp_path, options, alike):
    options = [*options, f"init_from={whole / 'alignment' / 'model'}"]
    codes, text = train(server, tiny, tmp_path / "still", *options, stage=2)
    assert codes == [0, 0], text
    stop_after(server, tiny, tmp_path / "moved", 3, *options, stage=2)
    codes, text = train(server, tiny, tmp_path / "moved", *options, stage=2)
    assert codes == [0, 0] and "resuming at step 4" in text, text
    alike(tmp_path / "moved", tmp_path / "still", "shrinking")


@pytest.mark.long  # several starts of real ranks
def test_bf16_is_bf16_under_each_zero_stage(server, tiny, whole, tmp_path):
    """DeepSpeed leaves what it has not built itself in fp32 under ZeRO-3."""
    for number in (2, 3):
        options = [f"deepspeed=ds_configs/zero{number}.json", "model.dtype=bfloat16", "optim.steps=1"]
        codes, text = train(
            server,
            tiny,
            tmp_path / str(number),
            *options,
            f"init_from={whole / 'alignment' / 'model'}",
            stage=2,
            fault=["tell_types"],
        )
        assert codes == [0, 0], text
        told = re.findall(r"trained: .*", text)  # of one rank or both
        assert told and "float32" not in "".join(told), told
        assert all(part in told[0] for part in ("alignment", "shrinking", "ctc_head", "llm")), told


def test_another_zero_stage_is_refused(server, tiny, tmp_path):
    stop_after(server, tiny, tmp_path, 1, ranks=1)
    codes, text = train(server, tiny, tmp_path, "deepspeed=ds_configs/zero1.json", ranks=1)
    assert codes == [2] and "step-000002 was written under ZeRO-3 and this run uses ZeRO-1" in text
    assert "set `deepspeed` to a ZeRO-3 configuration again" in text


def test_stop_before_the_first_step_resumes_with_other_ranks(server, tiny, whole, tmp_path):
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "STOP").touch()
    codes, text = train(server, tiny, tmp_path, "deepspeed=ds_configs/zero1.json", ranks=1)
    assert codes == [85] and "stopped before step 0" in text, text
    (tmp_path / "alignment" / "STOP").unlink(missing_ok=True)
    codes, text = train(server, tiny, tmp_path)
    first = tmp_path / "alignment" / "checkpoints" / "step-000000"
    assert (
        codes == [0, 0]
        and f"{first} is of step 0, and of other ranks or another ZeRO stage: starting" in text
    ), text
    assert not first.exists()
    assert_same_end(tmp_path, whole)


def elastic(server, tiny, tmp_path, road: list[tuple[int, int | None]], *options, stage: int = 1) -> None:
    """road: (ranks, step after which they are stopped). Compares with two ranks that go the whole way."""
    name, output = STAGES[stage], tmp_path / "moved"
    codes, text = train(server, tiny, tmp_path / "still", *COMPARABLE, *options, stage=stage)
    assert codes == [0, 0], text
    for ranks, last in road:
        if last is not None:
            stop_after(server, tiny, output, last, *COMPARABLE, *options, stage=stage, ranks=ranks)
            newest = output / name / "checkpoints" / f"step-{last + 1:06d}"
            (newest / "universal.partial" / "zero").mkdir(parents=True)  # as a killed conversion leaves it
        else:
            codes, text = train(server, tiny, output, *COMPARABLE, *options, stage=stage, ranks=ranks)
            assert codes == [0] * ranks and "for another number of ranks, once" in text, text
    assert not (newest / "universal.partial").exists() and (newest / "universal" / "zero").is_dir()
    # The same sums in another order. Measured: at most 1.1e-7, under every ZeRO stage.
    assert_close_end(output, tmp_path / "still", name)


@pytest.mark.slow
@pytest.mark.long  # the next test has the same moves, and back again
def test_two_ranks_then_one(server, tiny, tmp_path):
    elastic(server, tiny, tmp_path, [(2, 3), (1, None)])


# Two conversions, five launches each: 15 s and more.
@pytest.mark.long
@pytest.mark.parametrize(("stage", "zero"), [(1, 2), (2, "3_offload")])
def test_two_ranks_one_rank_two_ranks(server, tiny, whole, tmp_path, stage, zero):
    options = [f"deepspeed=ds_configs/zero{zero}.json"]
    if stage > 1:
        options.append(f"init_from={whole / 'alignment' / 'model'}")
    elastic(server, tiny, tmp_path, [(2, 2), (1, 4), (2, None)], *options, stage=stage)


@pytest.mark.slow  # seven starts of real ranks
def test_killed_and_moved_from_one_to_two_ranks_and_back(server, tiny, whole, tmp_path):
    """Stage 2 on 2-1-2-1-2-2 ranks under ZeRO-3, three are killed, with other micro-batches on the way
    and dropout of 0.1 in adapters and LoRA: the losses and weights of a run that was left alone."""
    moved = tmp_path / "moved"
    options = [*COMPARABLE, f"init_from={whole / 'alignment' / 'model'}", "optim.steps=14", "data.workers=0"]
    codes, text = train(server, tiny, tmp_path / "still", *options, stage=2)
    assert codes == [0, 0] and "rows of a micro-batch are joined" in text, text
    for ranks, kind, step, more in (
        (2, "SIGKILL", 3, []),
        (1, "SIGTERM", 4, ["data.micro_batch_seconds=9"]),
        (2, "SIGKILL", 8, []),
        (1, "SIGTERM", 9, []),
        (2, "SIGKILL", 12, ["optim.activation_checkpointing=true"]),
    ):
        fault = ["signal_after", step, kind, ranks - 1]
        run = server.start(
            [tiny / "stage2.yaml", f"output={moved}", *OPTIONS, *options, *more], ranks=ranks, fault=fault
        )
        codes = run.wait(patience=0.5)
        assert codes == [85] * ranks if kind == "SIGTERM" else -signal.SIGKILL in codes, run.text()
        # The first kill may come before the checkpoint of step 2 is on the disk.
        assert step <= 4 or "resuming at step" in run.text()
    codes, text = train(server, tiny, moved, *options, stage=2)
    assert codes == [0, 0] and "resuming at step" in text, text
    assert_close_end(moved, tmp_path / "still", "shrinking")


@pytest.mark.slow  # several starts of real ranks
def test_activation_checkpointing_gives_the_same_losses(server, tiny, whole, tmp_path):
    start = f"init_from={whole / 'alignment' / 'model'}"
    for name in ("false", "true"):
        codes, text = train(
            server,
            tiny,
            tmp_path / name,
            start,
            f"optim.activation_checkpointing={name}",
            "model.llm.lora_dropout=0.1",
            stage=2,
            ranks=1,
        )
        assert codes == [0], text
    with_it, without = (loss_curve(tmp_path / name, "shrinking") for name in ("true", "false"))
    torch.testing.assert_close(with_it, without, rtol=1e-6, atol=0)


@pytest.mark.long  # two runs of two ranks: one minute
def test_validation_layer_by_layer_writes_what_whole_models_write(server, tiny, whole, tmp_path):
    """ZeRO-3 ranks with unequal answers to write keep in step without holding the model, and write the
    same."""
    start, found = f"init_from={whole / 'alignment' / 'model'}", []
    for name in ("true", "false"):
        codes, text = train(
            server,
            tiny,
            tmp_path / name,
            start,
            f"log.gather_to_validate={name}",
            "optim.steps=2",
            "log.validate_every_steps=2",
            "log.validate_utterances=3",
            f"data.valid=[{{shards: {tiny / 'valid'}}}]",
            stage=2,
        )
        assert codes == [0, 0], text
        keys = ("step", "ce", "ctc", "wer", "words")
        found.append(
            [{key: line[key] for key in keys} for line in metrics(tmp_path / name, "valid", "shrinking")]
        )
    assert found[0] and found[0] == found[1]


# ------------------------------------------------------------------------------------------------ preemption


def test_time_limit_stops_and_saves(server, tiny, tmp_path):
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 5)}
    codes, text = train(server, tiny, tmp_path, "optim.steps=100000", environment=end)
    assert codes == [85, 85] and "(time limit on rank 0; time limit on rank 1), saved, exit code 85" in text


def test_margin_before_a_time_limit_follows_the_longest_save(tmp_path):
    now = time.time()
    before = [(number, signal.getsignal(number)) for number in (signal.SIGUSR1, signal.SIGTERM)]
    try:
        preemption = Preemption(tmp_path, end_time=now + 4000)
        assert preemption.margin(save_seconds=10) == 120 and preemption.margin(save_seconds=100) == 300
        assert preemption.margin(save_seconds=1000) == pytest.approx(2000, abs=5), (
            "never more than half of what is left"
        )
        assert preemption.stop_reason(save_seconds=100, step_seconds=10) is None
        assert preemption.stop_reason(save_seconds=100, step_seconds=3701) == "time limit"
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ health


@pytest.mark.slow  # several starts of real ranks
def test_roll_back_continues_after_the_bad_stretch(server, tiny, tmp_path):
    """Against a second opinion: the checkpoint it went back to, resumed by a new process at the data behind
    the stretch."""
    options = ["health.max_consecutive_skips=2", "checkpoint.keep_last=9"]
    codes, text = train(server, tiny, tmp_path / "back", *options, fault=["loud_clips", 5, 6])
    assert codes == [0, 0], text
    assert "roll-back 1 of 2: steps 5, 6 were not fit to be applied (" in text
    recipe = load_recipe(tiny / "stage1.yaml", OPTIONS)
    plan = Plan.open(recipe.data, "alignment", 16)
    planned = [
        {
            json.loads(json.dumps(plan.indexes[e["corpus"]].read(int(e["row"]))[1]))["id"]
            for e in plan.global_batch(step)
        }
        for step in (5, 6)
    ]
    skipped = list(
        map(json.loads, (tmp_path / "back" / "alignment" / "skipped.jsonl").read_text().splitlines())
    )
    assert [set(line["ids"]) for line in skipped] == planned and [line["data_step"] for line in skipped] == [
        5,
        6,
    ]
    (event,) = metrics(tmp_path / "back", "event")
    assert (event["event"], event["step"], event["from_step"], event["data_offset"]) == ("roll_back", 4, 7, 3)
    assert [line["step"] for line in metrics(tmp_path / "back", "train")] == list(range(8)), (
        "each step stands once"
    )
    source, target = (
        tmp_path / name / "alignment" / "checkpoints" / "step-000004" for name in ("back", "resumed")
    )
    shutil.copytree(source, target)
    state = json.loads((target / "state.json").read_text())
    (target / "state.json").write_text(json.dumps(state | {"data_offset": 3}))
    manifest = json.loads((target / "manifest.json").read_text())
    edited = target / "state.json"
    manifest["files"]["state.json"] = {"size": edited.stat().st_size, "sha256": sha256_of(edited)}
    (target / "manifest.json").write_text(json.dumps(manifest))
    codes, text = train(server, tiny, tmp_path / "resumed", *options)
    assert codes == [0, 0], text
    assert torch.equal(loss_curve(tmp_path / "back")[4:], loss_curve(tmp_path / "resumed"))
    ours, theirs = (weights(tmp_path / name / "alignment") for name in ("back", "resumed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow  # several starts of real ranks
def test_a_stretch_that_does_not_end_stops_with_a_report(server, tiny, tmp_path):
    options = ["health.max_consecutive_skips=2", "health.max_rollbacks=1"]
    codes, text = train(server, tiny, tmp_path, *options, fault=["loud_clips", 4, 1000], ranks=1)
    assert codes == [1]
    line = next(line for line in text.splitlines() if "stopped before step 6: " in line)
    assert (
        "steps 4, 5 were not fit to be applied (" in line
        and "; their utterances: " in line
        and " asr-" in line
    )
    assert "1 roll-back(s) did not help" in line
    noted = json.loads((tmp_path / "alignment" / "run.json").read_text())
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()  # "": none
    assert noted["status"] == "failed" and (noted["commit"] or "").removesuffix("-dirty") == head


@pytest.mark.slow  # several starts of real ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_diverged_ranks_are_reported(server, tiny, whole, tmp_path, zero):
    name = next(iter(sorted(load_file(whole / "alignment" / "model" / "adapters.safetensors"))))
    options = ["health.desync_every_steps=1", f"deepspeed=ds_configs/zero{zero}.json"]
    codes, text = train(server, tiny, tmp_path, *options, fault=["other_weights", 2, 1, name])
    assert codes == [1, 1], text
    told = f"rank 1 holds another {name} than rank 0" if zero == 1 else "rank 1"
    assert "stopped before step 3: the ranks have diverged: " in text and told in text and name in text
    assert "they were equal at step 2" in text


@pytest.mark.slow
@pytest.mark.long  # stages 1 to 3 twice, nine starts of real ranks; `make soak` kills 30 times
def test_three_kills_over_three_stages_change_nothing(tmp_path):
    result = soak(kills=3, minutes=30, seed=1, folder=tmp_path, steps=16)
    assert result["kills"] == 3 and result["tensors_equal"] > 30
