"""The op on a weight that is a DeepSpeed ZeRO-3 partition, two real ranks over gloo, against one process
without DeepSpeed."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from model.ops import linear_ctc

IMPLEMENTATIONS = ("cpp", "reference")
KINDS = ("trained", "frozen", "external")  # external: the head uses an embedding that another module owns


class Head(nn.Module):
    def __init__(self, kind: str, implementation: str, embedding: nn.Embedding):
        super().__init__()
        self.kind, self.implementation = kind, implementation
        self.blank_row = nn.Parameter(torch.randn(12))
        if kind == "external":
            self.borrowed = [embedding]  # in a list: not this module's child
        else:
            self.weight = nn.Parameter(torch.randn(700, 12), requires_grad=kind == "trained")

    def forward(self, hidden, lengths, targets, target_lengths):
        weight = self.borrowed[0].weight if self.kind == "external" else self.weight
        return linear_ctc(
            hidden,
            weight,
            lengths,
            targets,
            target_lengths,
            700,
            extra_row=self.blank_row,
            reduction="sum",
            implementation=self.implementation,
        )[0]


class Network(nn.Module):
    def __init__(self, kind: str, implementation: str):
        super().__init__()
        self.below = nn.Linear(12, 12)
        self.embedding = nn.Embedding(700, 12)
        self.embedding.weight.requires_grad_(kind == "external")
        self.head = Head(kind, implementation, self.embedding)

    def forward(self, hidden, lengths, targets, target_lengths):
        return self.head(self.below(hidden), lengths, targets, target_lengths)


def build(kind: str, implementation: str) -> tuple[Network, list[torch.Tensor]]:
    torch.manual_seed(0)
    network = Network(kind, implementation)
    return network, [
        torch.randn(4, 9, 12),
        torch.tensor([9, 7, 9, 2]),
        torch.randint(700, (4, 3)),
        torch.tensor([3, 2, 0, 1]),
    ]


def gradients_alone(kind: str, implementation: str) -> dict[str, torch.Tensor]:
    network, batch = build(kind, implementation)
    network(*batch).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}


def one_rank() -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    worst = {}
    for kind in KINDS:
        for implementation in IMPLEMENTATIONS:
            network, batch = build(kind, implementation)
            zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
            }
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=network, optimizer=torch.optim.SGD(trained, lr=0.1), config=config
            )
            if kind == "external":
                deepspeed.zero.register_external_parameter(network.head, network.embedding.weight)
            loss = engine(*[tensor[2 * rank : 2 * rank + 2] for tensor in batch])
            assert all(parameter.numel() == 0 for parameter in network.parameters()), (
                "still gathered after forward"
            )
            engine.backward(2 * loss)  # DeepSpeed takes the mean of the ranks; the reference is their sum
            expected = gradients_alone(kind, implementation)
            for name, parameter in network.named_parameters():
                gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
                if gradient is not None:
                    error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                    worst[f"{kind} {implementation} {name}"] = float(error)
            engine.step()
    if rank == 0:
        print("RESULT " + json.dumps(worst), flush=True)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's exit


@pytest.mark.slow
def test_two_ranks_as_one_process():
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.model.ops.test_zero3"],
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    result = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    errors = json.loads(result.removeprefix("RESULT "))
    assert {name.split()[0] for name in errors} == set(KINDS) and all(
        error < 1e-5 for error in errors.values()
    ), errors
    assert "trained cpp head.weight" in errors and "external cpp embedding.weight" in errors


if __name__ == "__main__":
    one_rank()
