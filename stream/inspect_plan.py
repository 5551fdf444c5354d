"""Print what a recipe's steps hold, from the index alone; --profile measures reading.

`python -m stream RECIPE --steps 5 [--ranks 8] [--profile] [--ids] [key=value ...]`
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from core.command_line import CommandParser
from recipe.config import Recipe, RecipeError, load_recipe
from stream.assign import Budgets, assign, padded_cost
from stream.epochs import resolve_steps
from stream.plan import NO_LANGUAGE, UNITS_PER_SECOND, Plan, UnindexedPlan, mix64


def effective_number(labels: np.ndarray) -> float:
    """exp(entropy) of labels: how many equally frequent ones would be as mixed."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def shuffle_quality(plan: Plan, steps: int = 20) -> float:
    """How many shards a global batch is effectively drawn from, as a share of what drawing from the whole
    corpus would give.

    1: as good as a full shuffle. A window of w out of S shards gives about w / S where batches are large, 1
    where they are smaller than the window. Mean over the first `steps` steps and the sources; each weighs by
    its utterances.
    """
    ours = full = 0.0
    for step in range(steps):
        batch = plan.global_batch(step)
        for source, order in enumerate(plan.orders):
            rows = batch["row"][batch["source"] == source]
            if len(rows) == 0:
                continue
            shards = plan.indexes[plan.corpus_of[source]].samples["shard"]
            drawn = mix64(np.arange(len(rows), dtype=np.uint64) + np.uint64(step << 32)) % np.uint64(
                len(order.rows)
            )
            ours += len(rows) * effective_number(shards[rows])
            full += len(rows) * effective_number(shards[order.rows[drawn.astype(np.int64)]])
    return min(ours / full, 1.0)


def describe_sources(plan: Plan, steps: int) -> list[dict]:
    """One row per task and corpus: size, share of the utterances at the beginning and the end, epochs of
    the stage."""
    begin, end, passes = plan.shares(0), plan.shares(steps), plan.passes(steps)
    rows = []
    for name, order in zip(plan.names, plan.orders, strict=True):
        seconds = order.total / UNITS_PER_SECOND
        rows.append(
            {
                "source": name,
                "utterances": len(order.rows),
                "hours": seconds / 3600,
                "mean_seconds": seconds / len(order.rows),
                "share_first": begin[name],
                "share_last": end[name],
                "passes": passes[name],
            }
        )
    return rows


def language_lines(plan: Plan | UnindexedPlan, steps: int) -> list[str]:
    """Return the table of languages of a stage, its title first; nothing without language_alpha."""
    if isinstance(plan, UnindexedPlan) or not (rows := plan.language_table(steps)):
        return []
    alpha = plan.data.mixture.language_alpha
    lines = [
        "",
        f"languages, data.mixture.language_alpha={alpha:g}",
        f"{'language':32} {'hours':>10} {'of audio':>8} {'passes':>7}",
    ]
    lines += [
        f"{row['language'][:32]:32} {row['hours']:10,.2f} {row['share']:8.1%} {row['passes']:7.2f}"
        for row in rows
    ]
    if any(row["language"] == NO_LANGUAGE for row in rows):
        lines.append(f"{NO_LANGUAGE}: samples that were packed without `lang`")
    return lines


def describe_step(plan: Plan, step: int, ranks: int) -> dict:
    """What one step holds, over all ranks. Tokens are estimates from the index; imbalance is that of padded
    cost."""
    batch, budgets = plan.global_batch(step), Budgets.of(plan.data)
    dealt = assign(batch["seconds"], batch["positions"], ranks, budgets)
    cost = np.array(
        [
            sum(padded_cost(batch["seconds"][g], batch["positions"][g], budgets) for g in rank)
            for rank in dealt
        ]
    )
    groups = [group for rank in dealt for group in rank if len(group)]
    padded = sum(np.count_nonzero(batch["seconds"][g]) * float(batch["seconds"][g].max()) for g in groups)
    seconds = float(batch["seconds"].sum())
    tasks = {plan.names[s]: int((batch["source"] == s).sum()) for s in range(len(plan.names))}
    return {
        "step": step,
        "utterances": len(batch),
        "seconds": seconds,
        "padding": 1 - seconds / padded if padded else 0.0,
        "micro_batches": len(dealt[0]),
        "imbalance": float(cost.max() / cost.mean() - 1),
        "tokens": int(batch["positions"].sum()),
        "longest": float(batch["seconds"].max()),
        "tasks": {name: count for name, count in tasks.items() if count},
    }


def step_ids(plan: Plan, step: int) -> list[str]:
    """corpus/id of every utterance of a step, in plan order. rejected.jsonl names a broken one's
    replacement."""
    entries = plan.global_batch(step)
    return [
        f"{plan.indexes[entry['corpus']].name}/{plan.indexes[entry['corpus']].read(int(entry['row']))[1]['id']}"
        for entry in entries
    ]


def profile(recipe: Recipe, plan: Plan, steps: int, ranks: int) -> dict:
    """Read `steps` steps of rank 0 with the recipe's workers, and say how fast it went and where workers
    spent their time."""
    from model.language_model import load_tokenizer
    from model.pretrained import locate
    from stream.packed import Stream

    tokenizer = load_tokenizer(locate(recipe.model.llm.name), recipe.model.audio_token)
    stream = Stream(recipe.data, recipe.stage, tokenizer, recipe.model, 0, ranks, 0, steps, plan=plan)
    began = time.perf_counter()
    first, samples, seconds, rejected, retries = 0.0, 0, 0.0, 0, 0
    timings: dict[str, float] = {}
    for step in stream:
        first = first or time.perf_counter() - began
        samples, seconds = samples + step.samples, seconds + step.seconds
        rejected, retries = rejected + len(step.rejected), retries + step.retries
        for name, value in step.timings.items():
            timings[name] = timings.get(name, 0.0) + value
    wall = time.perf_counter() - began
    return {
        "wall": wall,
        "first_step": first,
        "samples_per_second": samples / wall,
        "audio_seconds_per_second": seconds / wall,
        "workers": recipe.data.workers,
        "worker_seconds": timings,
        "rejected": rejected,
        "retries": retries,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m stream",
        "What a recipe's steps hold, before training.",
        example="train/recipes/stage1.yaml --steps 2",
    )
    parser.add_argument("recipe", help="recipe to look at")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to change")
    parser.add_argument("--steps", type=int, default=5, help="how many steps to show")
    parser.add_argument("--first", type=int, default=0, help="the first step shown")
    parser.add_argument(
        "--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="ranks that share each step"
    )
    parser.add_argument(
        "--profile", action="store_true", help="read the steps of rank 0, too (needs the LLM's tokenizer)"
    )
    parser.add_argument(
        "--ids", action="store_true", help="the ids of each step's utterances: what did step N see?"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        resolve_steps(recipe)
        began = time.perf_counter()
        plan = Plan.open(recipe.data, recipe.stage, recipe.optim.total_steps, recipe.model)
        took = time.perf_counter() - began
        if isinstance(plan, UnindexedPlan):
            raise RecipeError(
                "data.train is streamed without an index, so nothing is known of its steps beforehand: pack "
                "it "
                "(python data_tools/pack.py)"
            )
        shown = range(options.first, options.first + options.steps)
        excluded = [
            {"corpus": plan.indexes[e.corpus].name, "reason": e.reason, "utterances": len(e.rows)}
            for e in plan.excluded
        ]
        facts = {
            "plan_seconds": took,
            "fingerprint": plan.fingerprint,
            "shuffle_quality": shuffle_quality(plan),
            "sources": describe_sources(plan, recipe.optim.total_steps),
            "languages": plan.language_table(recipe.optim.total_steps),
            "excluded": excluded,
            "steps": [describe_step(plan, step, options.ranks) for step in shown],
        }
        if options.ids:
            facts["ids"] = {step: step_ids(plan, step) for step in shown}
        if options.profile:
            facts["profile"] = profile(recipe, plan, options.steps, options.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    languages = language_lines(plan, recipe.optim.total_steps)
    print(json.dumps(facts) if options.json else report(facts, recipe, options.ranks, languages))
    return 0


def report(facts: dict, recipe: Recipe, ranks: int, languages: list[str]) -> str:
    lines = [
        f"stage {recipe.stage}: {recipe.optim.total_steps} steps of {recipe.data.batch_seconds:g} s on "
        f"{ranks} "
        f"rank(s); plan "
        f"{facts['fingerprint'][:12]} in {facts['plan_seconds']:.2f} s; shuffle quality "
        f"{facts['shuffle_quality']:.2f}",
        "",
        f"{'source':32} {'utterances':>10} {'hours':>8} {'mean s':>7} {'share':>6} {'at end':>6} "
        f"{'passes':>7}",
    ]
    for row in facts["sources"]:
        lines.append(
            f"{row['source'][:32]:32} {row['utterances']:10,} {row['hours']:8.2f} {row['mean_seconds']:7.2f} "
            f"{row['share_first']:6.1%} {row['share_last']:6.1%} {row['passes']:7.2f}"
        )
    for row in facts["excluded"]:
        lines.append(f"  left out of {row['corpus']}: {row['utterances']:,} x {row['reason']}")
    lines += [
        *languages,
        "",
        f"{'step':>6} {'utterances':>10} {'audio s':>8} {'longest':>7} {'padding':>7} {'micro':>5} "
        f"{'imbalance':>9} "
        f"{'LLM tokens':>10}  by source",
    ]
    for row in facts["steps"]:
        lines.append(
            f"{row['step']:6} {row['utterances']:10} {row['seconds']:8.1f} {row['longest']:7.1f} "
            f"{row['padding']:7.1%} "
            f"{row['micro_batches']:5} {row['imbalance']:9.1%} {row['tokens']:10,}  "
            + " ".join(f"{name}:{count}" for name, count in row["tasks"].items())
        )
    for step, ids in facts.get("ids", {}).items():
        lines += ["", f"step {step}:", *(f"  {name}" for name in ids)]
    if "profile" in facts:
        profile = facts["profile"]
        total = sum(profile["worker_seconds"].values()) or 1.0
        lines += [
            "",
            f"rank 0 read in {profile['wall']:.2f} s with {profile['workers']} worker(s): "
            f"{profile['samples_per_second']:.1f} samples/s, {profile['audio_seconds_per_second']:.0f} audio "
            f"s/s; "
            f"first step after {profile['first_step']:.2f} s; "
            f"{profile['rejected']} rejected, {profile['retries']} retries",
            "worker time: "
            + ", ".join(f"{name} {value / total:.0%}" for name, value in profile["worker_seconds"].items()),
        ]
    return "\n".join(lines)
