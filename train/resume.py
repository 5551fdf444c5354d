"""What a checkpoint belongs to: base, tokenizer, recipe, data. Another one is an error that says what differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from core.code import code_hash
from train.config import Recipe, RecipeError

# Keys that do not change what is computed: they may differ between a run and its continuation.
_FREE = ("output", "checkpoint.", "log.", "deepspeed", "data.valid", "data.workers", "data.prefetch", "data.try_largest",
         "data.max_rejected_share",
         "data.micro_batch_seconds",  # the global batches, hence the gradients, stay the same
         "optim.activation_checkpointing",
         "health.desync_every_steps", "init_from", "data.cache_features",
         "model.encoder.name", "model.llm.name")  # names: the base's hash is compared instead
KINDS = ("base", "tokenizer", "recipe", "index")


def flat(node: object, prefix: str = "") -> dict[str, object]:
    """A dataclass or dict as {"a.b": value}."""
    node = dataclasses.asdict(node) if dataclasses.is_dataclass(node) else node
    out: dict[str, object] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _free(key: str) -> bool:
    return any(key == f or (f.endswith(".") and key.startswith(f)) for f in _FREE)


def known(corpus: dict) -> dict:
    """A corpus without a key that checkpoints made before there was one do not hold, where it changes nothing."""
    return {key: value for key, value in corpus.items() if (key, value) != ("share_from", 0.0)}


def recipe_facts(recipe: Recipe) -> dict[str, object]:
    facts = {key: value for key, value in flat(recipe).items() if not _free(key)}
    # Where the shards lie may change; what they hold is the index's fingerprint.
    facts["data.train"] = [{k: v for k, v in known(corpus).items() if k != "shards"} for corpus in facts["data.train"]]
    return facts


def code_fingerprint() -> str:
    """sha256 over the source of core/, model/ and train/: a difference is logged, since code may change between sessions."""
    return code_hash(("core", "model", "train"))


def differences(saved: dict, now: dict) -> dict[str, list[str]]:
    """Kind -> "key: saved -> now" lines, for the kinds that differ."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        old = flat(saved[kind]) if isinstance(saved[kind], dict) else {kind: saved[kind]}
        new = flat(now[kind]) if isinstance(now[kind], dict) else {kind: now[kind]}
        lines = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys())
                 if old.get(key) != new.get(key) and not (kind == "recipe" and _free(key))]  # one that has become free since
        if lines:
            found[kind] = lines
    return found


def check(saved: dict, now: dict, accepted: list[str], where: Path) -> list[str]:
    """Lines about accepted differences. Errors: RecipeError naming what differs and the switch that accepts it."""
    for kind in accepted:
        if kind not in KINDS:
            raise RecipeError(f"checkpoint.accept_changes: '{kind}' is not one of {', '.join(KINDS)}")
    notes = []
    for kind, lines in differences(saved, now).items():
        text = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        if kind not in accepted:
            raise RecipeError(f"{where} was made with another {kind} ({text}): give the old one back, choose another output "
                              f"folder, or accept it with checkpoint.accept_changes=[{','.join([*accepted, kind])}]")
        notes.append(f"{kind} has changed and is accepted: {text}")
    if saved["code"] != now["code"]:
        notes.append("the code of core/, model/ or train/ has changed since the checkpoint was made")
    return notes
