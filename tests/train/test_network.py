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
