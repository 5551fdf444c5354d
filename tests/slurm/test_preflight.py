"""Preflight: what is wrong, on which node, in one line; first its judgement alone, then in jobs of a real
Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from core import files
from core.options import RecipeError
from model.encoder import build_encoder
from model.pretrained import fingerprint, locate
from recipe.config import Recipe
from train import optim
from train.preemption import PORT_TAKEN
from train.preflight import (
    Report,
    check_base,
    check_cpu,
    compare,
    first_of_node,
    gather,
    main,
    run,
    write_faults,
)
from train.staging import stage_corpus


def report(node: str, rank: int = 0, **facts: str) -> Report:
    return Report(node, rank, facts=facts)


def test_the_minority_is_at_fault():
    reports = [
        report("a", torch="2.1"),
        report("b", 1, torch="2.0"),
        report("c", 2, torch="2.1"),
        Report("c", 3),
    ]
    faults = compare(reports)
    assert [(fault.node, fault.text, fault.from_input) for fault in faults] == [
        ("b", "torch is 2.0, but 2.1 on a and 1 more: give all nodes the same", False)
    ]
    assert compare([report("a", torch="2.1"), report("b", torch="2.1")]) == []


def test_a_fault_of_the_input_differs_from_one_of_a_node():
    first, second = Report("a", 0, input_faults=["no shard"]), Report("b", 1, node_faults=["no GPU"])
    assert [(fault.node, fault.text, fault.from_input) for fault in compare([first, second])] == [
        ("a", "no shard", True),
        ("b", "no GPU", False),
    ]


def test_ops_that_another_cpu_cannot_run_are_reported(monkeypatch, tmp_path):
    (tmp_path / ".setup").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe, flags = Recipe(), Path("/proc/cpuinfo").read_text().split()

    def faults() -> list[str]:
        report = Report("a", 0)
        check_cpu(recipe, report)
        return report.node_faults

    assert faults() == [], "nothing is known of the machine that it was built on"
    (tmp_path / ".setup" / "cpu").write_text(
        " ".join(flag for flag in flags if flag.startswith("avx")) + " sse9"
    )
    assert faults() == []
    (tmp_path / ".setup" / "cpu").write_text("fpu avx1024 avx2048")
    assert len(faults()) == 1 and "built for a CPU with avx1024 avx2048" in faults()[0]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert faults() == [], "none runs where there are GPUs"
    recipe.deepspeed = "ds_configs/zero3_offload.json"
    assert len(faults()) == 1, "but the optimizer that is offloaded"


def test_offload_without_its_op_is_named_before_the_run(monkeypatch, tmp_path):
    recipe = Recipe(deepspeed="ds_configs/zero3_offload.json")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {"cpu_adam": False})

    def faults() -> list[str]:
        report = Report("a", 0)
        check_cpu(recipe, report)
        return report.input_faults

    assert faults() == [], "in an environment of somebody's own, DeepSpeed compiles it"
    (tmp_path / ".setup").mkdir()
    (fault,) = faults()
    assert fault.endswith("make setup EXTRAS=offload")
    with pytest.raises(RecipeError, match="make setup EXTRAS=offload"):
        optim.build([], recipe.optim, offload=True)
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {"cpu_adam": True})
    assert faults() == []
    recipe.deepspeed = "ds_configs/zero3.json"
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {})
    assert faults() == []


def test_ranks_that_never_report_are_named_with_their_node(monkeypatch):
    from datetime import timedelta

    import torch.distributed as dist

    for name, value in (
        ("SOUNDWAVE_NODES", "a b"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "a"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    store = dist.TCPStore(
        "127.0.0.1", 0, 4, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
    )
    for rank in (0, 1):
        store.set(f"report-{rank}", json.dumps(asdict(report("a", rank, torch="2.1"))))
    reports, faults = gather(store, 4, seconds=1.0)
    assert [r.rank for r in reports] == [0, 1]
    assert (
        len(faults) == 1 and faults[0].node == "b" and "no word from rank 2, 3 within 1 s" in faults[0].text
    )


@pytest.mark.parametrize(
    "local_id, by_torchrun, rank, first",
    [
        ("0", False, 8, True),
        ("1", False, 9, False),  # each sees its own GPU alone
        ("0", False, 1, True),
        ("1", False, 8, False),  # ranks dealt out to two nodes in turn
        ("0", True, 9, False),
        (None, False, 8, True),
        (None, False, 9, False),
    ],
)
def test_one_rank_a_node_looks_at_the_node(monkeypatch, local_id, by_torchrun, rank, first):
    for name, value in (
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("SLURM_LOCALID", local_id),
        ("TORCHELASTIC_RUN_ID", "none" if by_torchrun else None),
    ):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert first_of_node(rank) == first


def test_a_port_that_is_taken_is_no_firewall(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (
            ("RANK", 0),
            ("WORLD_SIZE", 2),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
        ):
            monkeypatch.setenv(name, str(value))
        assert run(Recipe(), seconds=5.0) == PORT_TAKEN
    assert f"port {port} is taken by another program" in capsys.readouterr().err


def test_what_the_job_scripts_ask_for_is_marked(tmp_path, capsys):
    """Modules and containers may print other lines beside it."""
    (tmp_path / "recipe.yaml").write_text("stage: shrinking\noutput: runs/with blanks\n")
    assert main([str(tmp_path / "recipe.yaml"), "--where"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "soundwave-where stage shrinking",
        "soundwave-where output runs/with blanks",
        "soundwave-where state unfinished",
        "soundwave-where start runs/with blanks/alignment/model",
    ]


def test_faults_that_cannot_be_kept_change_nothing(tmp_path, capsys):
    write_faults(tmp_path / "faults", ["node a: one", "node b: two"])
    assert (tmp_path / "faults").read_text() == "node a: one\nnode b: two\n"
    write_faults(Path("/dev/full"), ["node a: one"])
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err


def test_a_preemption_meanwhile_is_reported(tmp_path, assets):
    """The recipe is a pipe: whoever opened it listens to signals already."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    preflight = Path(__file__).resolve().parents[2] / "train" / "preflight.py"
    process = subprocess.Popen(
        [sys.executable, str(preflight), str(pipe)],
        cwd=tmp_path,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"},
    )
    try:
        with open(pipe, "w") as recipe:
            process.send_signal(signal.SIGTERM)
            recipe.write(assets.recipes(tmp_path / "real")[0].read_text())
        assert process.wait(timeout=300) == 85
    finally:
        process.kill()


def test_an_encoder_of_another_family_is_hashed_as_training_does(tmp_path):
    encoder = tmp_path / "wav2vec2"
    Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,),
            conv_stride=(4,),
            conv_kernel=(8,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(encoder)
    recipe = Recipe(stage="alignment", output=str(tmp_path / "run"))
    recipe.model.encoder.name, recipe.model.llm.name = str(encoder), str(tmp_path / "nowhere")
    source = locate(str(encoder))
    layers = build_encoder(recipe.model.encoder, source, torch.float32, None).layers
    checkpoint = tmp_path / "run" / "alignment" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(
        json.dumps({"facts": {"base": {"encoder": fingerprint(encoder, "wav2vec2.")}}})
    )
    report = Report("a", 0)
    check_base(recipe, report)
    assert [fault for fault in report.input_faults if "model.encoder" in fault] == []
    next(layers.parameters()).data.add_(1.0)
    layers.save_pretrained(encoder)
    for name in ("step-000002", "step-000003.partial"):  # as a node leaves it that dies while it saves
        (checkpoint.parent / name).mkdir()
        (checkpoint.parent / name / "state.json").touch()
    check_base(recipe, report := Report("a", 0))
    assert [
        "was made with another one" in fault for fault in report.input_faults if "model.encoder" in fault
    ] == [True]


def test_a_shard_that_is_cut_is_not_staged(assets, tmp_path):
    shutil.copytree(assets.shards, tmp_path / "shards")
    os.truncate(tmp_path / "shards" / "chirps-000001.tar", 1000)
    assert "1 of 2 shards copied" in stage_corpus(str(tmp_path / "shards"), tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").rglob("*.tar")] == ["chirps-000000.tar"]
    folder, own = next((tmp_path / "disk").iterdir()), f".at-work.tar.{os.getpid()}"
    for name in (
        own,
        f".left.tar.{2**22 + 1}",
    ):  # the second beyond the largest process number: its job was ended
        (folder / name).touch()
    stage_corpus(str(tmp_path / "shards"), tmp_path / "disk")
    assert [path.name for path in folder.glob(".*")] == [own]


def test_a_frozen_copy_names_the_commit_that_it_is_a_copy_of(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (tmp_path / "VERSION").write_text("abc1234-dirty\n")
    assert files.code_version() == "abc1234-dirty"
    (tmp_path / "VERSION").write_text("")
    assert files.code_version() is None


# --- in jobs ------------------------------------------------------------------------------------------------


@pytest.fixture
def job(project_with_preflight):
    def submit(state: str, **environment: str) -> str:
        identity = project_with_preflight.sbatch(
            "--ntasks-per-node=1",
            "--gpus-per-node=1",
            "slurm/stage1.sh",
            env={"RECIPE": "recipes/stage1.yaml", **environment},
        )
        project_with_preflight.expect(identity, state)
        return project_with_preflight.log()

    return submit


@pytest.fixture
def project_with_preflight(cluster, tmp_path, assets):
    """The real preflight before the stand-in trainer."""
    from tests.slurm.conftest import Project

    project = Project(tmp_path / "project", cluster)
    project.use_stand_in(preflight=False)
    assets.recipes(project.folder)
    return project


@pytest.mark.slurm
def test_all_is_well_and_said_so(job, assets):
    log = job("COMPLETED")
    fingerprint = json.loads((assets.shards / "index.json").read_text())["fingerprint"]
    assert (
        "preflight: 2 nodes, 2 ranks agree: python" in log
        and f"data {assets.shards} {fingerprint[:12]}" in log
    )
    assert "all_reduce of 8 MiB over 2 ranks" in log and "bus bandwidth" in log
    assert "GB free, 4 more checkpoints of 0.00" in log  # two kept, the best, and the one being written


@pytest.mark.slurm
def test_nodes_that_differ_are_named_before_any_training(
    job, project_with_preflight, cluster, assets, tmp_path
):
    """Another version of peft, and other weights of the same size, on one node alone."""
    installed = Path(str(metadata.distribution("peft")._path)) / "METADATA"
    other_version = tmp_path / "METADATA"
    other_version.write_text(
        installed.read_text().replace(f"Version: {metadata.version('peft')}", "Version: 0.1.0", 1)
    )
    weights = Path(assets.llm) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other_weights = tmp_path / "model.safetensors"
    other_weights.write_bytes(content)
    cluster.overlay("n1", installed, other_version)
    cluster.overlay("n1", weights, other_weights)
    try:
        log = job("FAILED")
    finally:
        cluster.remove_overlay("n1", installed)
        cluster.remove_overlay("n1", weights)
    # Of two nodes neither is the minority: the one behind is named, with both values.
    assert (
        f"error: node n1: peft is 0.1.0, but {metadata.version('peft')} on gpu-b7: give all nodes the "
        f"same" in log
    )
    assert f"error: node n1: model.llm {assets.llm} is " in log
    assert "requeue, restart" not in log and "alignment from step" not in log
    row = project_with_preflight.status()["alignment"]
    assert row["state"] == "failed" and row["last error"].startswith("node n1: ")


@pytest.mark.slurm
def test_a_shard_that_one_node_does_not_see_whole_is_named(job, cluster, assets, tmp_path):
    shard = assets.shards / "chirps-000001.tar"
    (tmp_path / "short.tar").write_bytes(shard.read_bytes()[:1000])
    cluster.overlay("n1", shard, tmp_path / "short.tar")
    try:
        log = job("FAILED")
    finally:
        cluster.remove_overlay("n1", shard)
    assert "error: node n1: data" in log and "chirps-000001.tar has 1000 bytes, the index says" in log
    assert "node gpu-b7: data" not in log and "alignment from step" not in log


@pytest.mark.slurm
def test_shards_are_staged_to_each_nodes_own_disk(job, assets, tmp_path):
    log = job("COMPLETED", STAGE_SHARDS="1", LOCAL_DISK=str(tmp_path / "disk"))
    fingerprint = json.loads((assets.shards / "index.json").read_text())["fingerprint"]
    copies = tmp_path / "disk" / f"soundwave-shards-{os.getuid()}" / fingerprint
    for name in ("chirps-000000.tar", "chirps-000001.tar"):
        assert (copies / name).read_bytes() == (assets.shards / name).read_bytes()
    assert "staging: node n1:" in log and "staging: node gpu-b7:" in log
    shutil.rmtree(copies)
