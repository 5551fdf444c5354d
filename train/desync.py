"""Do all ranks still hold the same? Copies that must be equal are compared by hash, shards with the
optimizer's own copy.

ZeRO-1/2: every trained parameter is whole on every rank. ZeRO-3: the small ones that DeepSpeed keeps gathered
are; of the others each rank holds the one shard there is, which must be what the optimizer's fp32 copy of it
rounds to.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param

from core.distributed import Ranks, gather


def _hash(tensor: torch.Tensor) -> bytes:
    numbers = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()


def _is_whole(parameter: Any) -> bool:  # Any: DeepSpeed adds attributes to parameters
    return not hasattr(parameter, "ds_id") or (
        parameter.ds_persist and parameter.ds_status == ZeroParamStatus.AVAILABLE
    )


def _shard_is_stale(parameter: Any) -> bool:
    shard, master = parameter.ds_tensor.detach().reshape(-1), safe_get_local_fp32_param(parameter)
    if master is None:
        return False
    master = master.reshape(-1)[: shard.numel()].to(shard)
    # NaN differs from itself: bytes are compared.
    return not torch.equal(
        master.contiguous().view(torch.uint8), shard[: master.numel()].contiguous().view(torch.uint8)
    )


def difference(model: torch.nn.Module, ranks: Ranks) -> str | None:
    """None where all ranks agree, else which rank differs in which parameters. Collective; the same answer on
    all ranks."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    copies = {name: _hash(p.data) for name, p in trained if _is_whole(p)}
    stale = [name for name, p in trained if hasattr(p, "ds_id") and _shard_is_stale(p)]
    by_rank = gather((copies, stale))
    shared = [name for name in copies if all(name in theirs for theirs, _ in by_rank)]
    usual = {
        name: Counter(theirs[name] for theirs, _ in by_rank).most_common(1)[0][0] for name in shared
    }  # of two: rank 0's
    descriptions = []
    for rank, (theirs, spoilt) in enumerate(by_rank):
        apart = [name for name in shared if theirs[name] != usual[name]]
        if apart:
            descriptions.append(
                f"rank {rank} holds another {_some(apart)} than "
                f"{'rank 0' if ranks.world_size == 2 else 'most ranks'}"
            )
        if spoilt:
            descriptions.append(f"rank {rank}'s shard of {_some(spoilt)} is not what its optimizer holds")
    return "; ".join(descriptions) or None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
