"""A rank that another rank does not answer ends with one line; on real nodes in network namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import network
from benchmarks.virtual_network import VirtualNetwork, missing
from core.distributed import lost_contact

GLOO = "[gloo/transport/tcp/unbound_buffer.cc:78] "


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (RuntimeError(GLOO + "Timed out waiting 1800000ms for recv operation to complete"), "7 minutes"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1"), "closed"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Read error: Connection reset by peer"), "closed"),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), "closed"),
        (RuntimeError("Timed out reading the store of clips"), None),
        (RuntimeError("CUDA out of memory"), None),
        (ValueError("the data timed out"), None),
    ],
)
def test_errors_of_the_network_are_named(error, part):
    line = lost_contact(error, 7)
    assert (line is None) if part is None else (part in line and "\n" not in line)


def test_no_child_is_left_by_a_hard_exit():
    script = (
        "import multiprocessing, sys, time\n"
        "from core.distributed import hard_exit\n"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(300,))\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "hard_exit(3)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120)
    assert found.returncode == 3  # and the child holds the pipe no more: run() has returned
    assert not Path(f"/proc/{found.stdout.split()[0]}/exe").exists()


@pytest.mark.long  # 25 s, of which 15 are the timeout
@pytest.mark.skipif(missing() is not None, reason=f"no virtual network: {missing()}")
def test_partition_ends_each_rank_with_one_line(server, tmp_path):
    from tests.train import tiny

    recipe = tiny.workspace(tmp_path / "tiny") / "stage1.yaml"
    with VirtualNetwork(2) as nodes:
        row = network.train(server, nodes, recipe, tmp_path / "out", lambda: nodes.groups.__setitem__(1, 1))
    assert row["codes"] == [1, 1]
    assert row["after"] < 2 * 60 * network.TIMEOUT_MINUTES
    for error in row["errors"]:
        assert "has not answered" in error or "closed its connection" in error
    assert "Traceback" not in "".join(
        log.read_text() for log in (tmp_path / "out" / "alignment" / "logs").iterdir()
    )


@pytest.mark.long  # 60 s: three runs
@pytest.mark.skipif(missing() is not None, reason=f"no virtual network: {missing()}")
def test_four_nodes_train_alike_on_a_bad_network_and_end_when_it_is_parted(server, tmp_path):
    from tests.train import tiny

    recipe = tiny.workspace(tmp_path / "tiny") / "stage1.yaml"
    with VirtualNetwork(4) as nodes:
        quiet = network.train(server, nodes, recipe, tmp_path / "quiet")
    with VirtualNetwork(4, loss=0.01) as nodes:
        nodes.rates[2] = 2e7
        bad = network.train(server, nodes, recipe, tmp_path / "bad")
        assert nodes.lost > 0
    assert quiet["codes"] == bad["codes"] == [0] * 4
    assert len(quiet["losses"]) == 8 and bad["losses"] == quiet["losses"]

    with VirtualNetwork(2) as nodes:
        two = network.train(server, nodes, recipe, tmp_path / "two")
    assert two["losses"] == pytest.approx(quiet["losses"], rel=2e-3)  # the same global batches

    def part(nodes: VirtualNetwork) -> None:
        nodes.groups[2] = nodes.groups[3] = 1

    with VirtualNetwork(4) as nodes:
        parted = network.train(server, nodes, recipe, tmp_path / "parted", lambda: part(nodes))
    assert parted["codes"] == [1] * 4
    assert parted["after"] < 2 * 60 * network.TIMEOUT_MINUTES
    for error in parted["errors"]:
        assert "has not answered" in error or "closed its connection" in error
