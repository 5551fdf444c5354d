"""What `python -m train.status` says of files as the trainer and the job scripts leave them."""

from __future__ import annotations

import json
import time

import pytest

from train.status import SILENT_SECONDS, main, slurm_states, stage_status


def note(run, stage, **values):
    (run / stage / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / stage / "run.json").write_text(json.dumps(values))


def events(run, *lines):
    """slurm.jsonl as slurm/common.sh writes it: stage, job, event, time, detail, restarts."""
    with open(run / "slurm.jsonl", "w") as file:
        for stage, job, name, when, *rest in lines:
            detail, restarts = (*rest, *("", 0)[len(rest) :])
            file.write(
                json.dumps(
                    {
                        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)),
                        "stage": stage,
                        "job": job,
                        "event": name,
                        "restarts": restarts,
                        "detail": detail,
                    }
                )
                + "\n"
            )


def test_running_stage_with_its_speed_restarts_and_one_in_the_queue(tmp_path, capsys):
    now = time.time()
    note(tmp_path, "alignment", status="running", step=40, steps=100, updated=now)
    (tmp_path / "alignment" / "checkpoints" / "latest").write_text("step-000030")
    lines = [json.dumps({"kind": "train", "step": i, "step_seconds": 2.0}) for i in range(40)]
    (tmp_path / "alignment" / "metrics.jsonl").write_text(
        "\n".join(lines) + '\n{"kind": "tra'
    )  # being written
    events(
        tmp_path,
        ("alignment", "7", "requeued", now - 60, "node failure", 1),
        ("shrinking", "8", "submitted", now - 90),
    )
    row = stage_status(tmp_path, "alignment", now, {})
    assert (row["state"], row["step"], row["s/step"], row["left"]) == ("running", "40/100", "2.00", "0:02:00")
    assert row["done at"] == time.strftime("%a %H:%M", time.localtime(now + 120))
    assert (row["restarts"], row["checkpoint"], row["job"]) == (1, "step-000030", "7")
    assert row["last error"] == "node failure"  # that the trainer which runs now has never known
    assert (
        stage_status(tmp_path, "shrinking", now, {})["state"] == "submitted"
        and stage_status(tmp_path, "sft", now, {}) is None
    )
    assert stage_status(tmp_path, "alignment", now + SILENT_SECONDS + 60, {})["state"].startswith("silent")
    later = now + SILENT_SECONDS + 50
    (tmp_path / "alignment" / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step_seconds": 70.0, "time": later})
    )
    assert stage_status(tmp_path, "alignment", later + 10, {})["state"] == "running", (
        "it writes that file in every step"
    )
    assert main([str(tmp_path)]) == 0 and "2 shrinking" in capsys.readouterr().out


def test_loss_of_the_last_steps_and_word_error_rates(tmp_path):
    note(tmp_path, "alignment", status="done", step=4, steps=4, updated=time.time())
    lines = [
        {"kind": "valid", "step": step, "wer": wer, "words": 9}
        for step, wer in ((0, 1.8), (2, 0.401), (4, 0.5))
    ]
    lines += [
        {"kind": "train", "step": step, "step_seconds": 1.0, "loss": loss}
        for step, loss in enumerate((9, 2, 1))
    ]
    lines.append({"kind": "valid", "step": 4, "wer": 0.0, "words": 0})  # no words: no rate
    path = tmp_path / "alignment" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "valid", "wer"')
    row = stage_status(tmp_path, "alignment", time.time(), {})
    assert (row["loss"], row["WER"], row["best WER"], row["done at"]) == ("2", "50.0 %", "40.1 %", "-")
    path.unlink()
    row = stage_status(tmp_path, "alignment", time.time(), {})
    assert (row["loss"], row["WER"], row["best WER"]) == ("-", "-", "-")


def test_failed_stage_tells_why_and_a_wrong_folder_is_said(tmp_path, capsys):
    note(tmp_path, "sft", status="failed", step=3, steps=9, updated=0.0, reason="disk full")
    row = stage_status(tmp_path, "sft", time.time(), {})
    assert (row["state"], row["last error"]) == ("failed", "disk full")
    assert main([str(tmp_path / "nowhere")]) == 2 and "give the recipes' `output`" in capsys.readouterr().err


def test_of_trainer_and_job_the_later_word_counts(tmp_path):
    """Preempted, requeued, and then stopped by the preflight: the trainer's run.json is from the start
    before."""
    now = time.time()
    note(
        tmp_path,
        "shrinking",
        status="preempted",
        step=14,
        steps=40,
        updated=now - 100,
        reason="SIGUSR1 on rank 0",
    )
    told = [
        ("shrinking", "8", "started", now - 300),
        ("shrinking", "8", "requeued", now - 98, "stopped in time"),
    ]
    events(tmp_path, *told)
    row = stage_status(tmp_path, "shrinking", now, {})
    assert (row["state"], row["step"], row["last error"]) == (
        "requeued",
        "14/40",
        "stopped in time; SIGUSR1 on rank 0",
    )
    events(tmp_path, *told, ("shrinking", "8", "failed", now - 50, "node n1: peft is 0.1.0", 1))
    row = stage_status(tmp_path, "shrinking", now, {})
    assert (row["state"], row["restarts"], row["last error"]) == ("failed", 1, "node n1: peft is 0.1.0")


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Stand-ins for squeue and sacct that print these lines, and note how they were asked."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def answers(squeue: str, sacct: str = "", code: int = 0) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            program = tmp_path / "bin" / name
            (tmp_path / f"{name}.txt").write_text(text)
            program.write_text(
                f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\nenv >>{tmp_path}/environment\n'
                f"cat {tmp_path}/{name}.txt\nexit {code}\n"
            )
            program.chmod(0o755)

    return answers


@pytest.mark.parametrize(
    "lines, noted, state",
    [
        ("8|PENDING|Dependency", "submitted", "pending (Dependency)"),
        ("8|PENDING|JobHeldUser", "submitted", "held (JobHeldUser)"),
        ("8|REQUEUE_HOLD|None", "requeued", "held"),
        ("8|CANCELLED|None", "submitted", "cancelled"),
        ("8|CANCELLED|None", "started", "cancelled"),
        ("8|FAILED|NonZeroExitCode", "failed", "failed"),
        ("8|FAILED|JobLaunchFailure", "submitted", "failed (JobLaunchFailure)"),
        ("8|NODE_FAIL|None", "started", "node_fail"),
        ("8|TIMEOUT|TimeLimit", "started", "timeout (TimeLimit)"),
        ("8|RUNNING|None", "started", "started"),
        ("8|COMPLETED|None", "resubmitted", "resubmitted"),
        ("", "submitted", "submitted, not in the queue"),
        ("", "failed", "failed"),
        ("Welcome to the cluster\n8|PENDING|Priority\n9|RUNNING|None", "submitted", "pending (Priority)"),
    ],
)
def test_slurm_is_asked_about_jobs_that_are_not_done(tmp_path, slurm, lines, noted, state):
    slurm(lines)
    events(tmp_path, ("alignment", "8", noted, time.time() - 60))
    known = slurm_states(["8"])
    assert stage_status(tmp_path, "alignment", time.time(), known)["state"] == state


def test_slurm_is_asked_once_and_knows_less_than_a_stage_that_is_done(tmp_path, slurm, monkeypatch, capsys):
    slurm("8|CANCELLED|None\n", "9|CANCELLED by 1000|None\n")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    now = time.time()
    events(
        tmp_path,
        ("alignment", "7", "done", now - 90),
        ("shrinking", "8", "submitted", now - 90),
        ("sft", "9", "submitted", now - 90),
    )
    note(tmp_path, "alignment", status="done", step=9, steps=9, updated=now - 95)
    assert main([str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[2] for row in rows] == ["done", "cancelled", "cancelled"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and "-j 8,9,8 " in asked[0] and "-j 9 " in asked[1]
    assert (
        "SQUEUE_" not in (tmp_path / "environment").read_text()
        and "SLURM_" not in (tmp_path / "environment").read_text()
    )


def test_without_an_answer_of_slurm_the_files_count(tmp_path, slurm, monkeypatch):
    slurm("8|PENDING|x\n", code=1)
    assert slurm_states(["8"]) == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert slurm_states(["8"]) == {} and slurm_states([]) == {}


def test_reasons_are_shown_without_control_characters(tmp_path):
    note(tmp_path, "sft", status="failed", step=3, steps=9, updated=0.0, reason="bad \x1b[31mname\nsecond")
    assert stage_status(tmp_path, "sft", time.time(), {})["last error"] == "bad  [31mname second"
