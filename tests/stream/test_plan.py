"""Guarantees of the plan, whatever the shards, ranks, budgets and mixtures. Indexes without audio: the plan
reads none."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.config import MixtureConfig, RecipeError
from stream.assign import Budgets, assign, padded_cost, padding_share
from stream.mixture import Mixture, task_probabilities
from stream.plan import Plan
from tests.stream.conftest import data_config, table_index

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def corpora(draw):
    """Shard sizes, lengths and budgets of a small corpus."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    seed = draw(st.integers(0, 10**6))
    longest = draw(st.floats(1.0, 30.0))
    durations = np.random.default_rng(seed).uniform(0.2, longest, sum(sizes)).astype(np.float32)
    batch = draw(st.floats(longest, 4 * longest))
    micro = draw(st.floats(longest / 2, 2 * longest))
    return (
        sizes,
        durations,
        {
            "batch_seconds": batch,
            "micro_batch_seconds": micro,
            "seed": seed % 5,
            "shuffle_window_shards": draw(st.integers(1, 13)),
        },
    )


def make(case, steps=1000):
    sizes, durations, budgets = case
    return Plan([table_index(durations, sizes)], data_config("x", **budgets), "alignment", steps)


def numbers(batch):
    return list(zip(batch["corpus"].tolist(), batch["row"].tolist(), batch["epoch"].tolist(), strict=True))


@FAST
@given(corpora())
def test_each_utterance_once_per_pass_and_no_empty_step(case):
    plan, seen, step = make(case), Counter(), 0
    while plan.passes(step)["x/asr"] < 2.2:
        batch = plan.global_batch(step)
        assert len(batch) > 0
        seen.update(numbers(batch))
        step += 1
    assert set(seen.values()) == {1}
    for epoch in range(2):
        assert sum(key[2] == epoch for key in seen) == len(case[1])


@FAST
@given(corpora(), st.integers(0, 60), st.permutations(range(8)))
def test_a_step_is_the_same_whatever_came_before(case, start, order):
    fresh, used = make(case), make(case)
    expected = {step: numbers(used.global_batch(step)) for step in range(start + 8)}
    for step in order:  # another plan, asked out of order, from the middle, over pass boundaries
        assert numbers(fresh.global_batch(start + step)) == expected[start + step]


@FAST
@given(corpora(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_equal_micro_batches_and_identical_ids_on_any_number_of_ranks(case, worlds):
    plan = make(case)
    for step in range(6):
        batch = plan.global_batch(step)
        for world in worlds:
            dealt = assign(batch["seconds"], batch["positions"], world, Budgets.of(plan.data))
            assert len(dealt) == world and len({len(rank) for rank in dealt}) == 1
            assert sorted(np.concatenate([group for rank in dealt for group in rank]).tolist()) == list(
                range(len(batch))
            )


@FAST
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_budgets_hold_for_every_micro_batch(seed, count, world, text):
    random = np.random.default_rng(seed)
    seconds = random.uniform(0.2, 30, count).astype(np.float32)
    positions = random.integers(20, 900, count).astype(np.uint32) if text else np.zeros(count, np.uint32)
    if text:
        seconds[random.random(count) < 0.3] = 0
    for rank in assign(seconds, positions, world, Budgets(60.0, 2000)):
        for group in rank:
            if len(group) > 1:
                assert np.count_nonzero(seconds[group]) * seconds[group].max() <= 60.001
                assert len(group) * positions[group].max() <= 2000


def test_text_only_turns_are_planned_by_what_it_takes_to_say_them():
    index = table_index(np.zeros(40), [40], tasks=("text",))
    index.samples["audio_size"], index.samples["characters"], index.samples["target_characters"] = 0, 0, 150
    plan = Plan([index], data_config("x", batch_seconds=100.0), "sft", 10)
    assert [len(plan.global_batch(step)) for step in range(4)] == [10, 10, 10, 10]  # 150 characters: 10 s
    assert (plan.global_batch(0)["seconds"] == 0).all() and (
        plan.global_batch(0)["positions"] == 48 + 50
    ).all()


def lengths(kind: str, count: int) -> np.ndarray:
    """Like read speech (most clips near 14 s), like spontaneous speech (many short clips), evenly spread."""
    random = np.random.default_rng(1)
    made = {
        "read": np.where(
            random.random(count) < 0.65, random.normal(14.2, 1.2, count), random.uniform(1.5, 14, count)
        ),
        "spontaneous": random.lognormal(1.0, 0.7, count),
        "even": random.uniform(0.5, 30, count),
    }[kind]
    return np.clip(made, 0.3, 30).astype(np.float32)


@pytest.mark.parametrize("kind", ["read", "spontaneous", "even"])
@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_imbalance_between_ranks(kind, ranks):
    """At most 5 % of the mean where a rank has two micro-batches and more."""
    seconds = lengths(kind, ranks * 480)
    seconds = seconds[np.cumsum(seconds) < ranks * 330]
    budgets = Budgets(120.0, 8192)
    dealt = assign(seconds, np.zeros(len(seconds), np.uint32), ranks, budgets)
    cost = np.array([sum(padded_cost(seconds[g], np.zeros(len(g)), budgets) for g in rank) for rank in dealt])
    assert cost.max() / cost.mean() - 1 <= 0.05
    assert len(dealt[0]) <= 4


@pytest.mark.parametrize("kind", ["read", "spontaneous", "even"])
@pytest.mark.parametrize(
    ("batch", "micro", "ranks"), [(3600.0, 120.0, 8), (240.0, 120.0, 2), (60.0, 30.0, 2)]
)
def test_padding(kind, batch, micro, ranks):
    plan = Plan(
        [table_index(lengths(kind, 4000), [400] * 10)],
        data_config("x", batch_seconds=batch, micro_batch_seconds=micro),
        "alignment",
        100,
    )
    shares = []
    for step in range(20):
        seconds = plan.global_batch(step)["seconds"]
        dealt = assign(seconds, np.zeros(len(seconds), np.uint32), ranks, Budgets(micro, 8192))
        shares.append(padding_share(seconds, [group for rank in dealt for group in rank]))
    assert np.mean(shares) <= 0.05


def test_batches_are_mixed():
    """Utterances of a step come from its whole window, neighbours differ from pass to pass, and lengths do
    not rise or fall."""
    plan = Plan(
        [table_index(lengths("read", 4000), [400] * 10)],
        data_config("x", batch_seconds=600.0, micro_batch_seconds=60.0, shuffle_window_shards=10),
        "alignment",
        1000,
    )
    steps = int(plan.orders[0].total / 600_000)
    batches = [plan.global_batch(step) for step in range(1, 2 * steps)]
    shards = [len(set((batch["row"] // 400).tolist())) for batch in batches]
    assert np.mean(shards) > 9
    means = np.array([batch["seconds"].mean() for batch in batches])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3

    def neighbours(part):
        return {
            frozenset(batch["row"][at : at + 2].tolist()) for batch in part for at in range(len(batch) - 1)
        }

    first, second = neighbours(batches[: steps - 1]), neighbours(batches[steps:])
    assert len(first & second) < 0.02 * len(first)


def test_plan_of_a_large_index_answers_at_any_step_alike():
    """200,000 utterances in 400 shards; the benchmark measures 10 million."""
    durations = lengths("read", 200_000)
    data = data_config("x", batch_seconds=3600.0, micro_batch_seconds=120.0)
    plan = Plan([table_index(durations, [500] * 400)], data, "alignment", 10**6)
    took = []
    for step in (0, 999, 123_456, 999_999):
        began = time.perf_counter()
        assert abs(plan.global_batch(step)["seconds"].sum() - 3600) < 120
        took.append(time.perf_counter() - began)
    assert max(took) < 2.0


# ---- the mixture ----


def test_tau_moves_from_proportional_to_balanced():
    shares = task_probabilities(np.array([900.0, 100.0]), np.array([1.0, 2.0, 1e9]))
    np.testing.assert_allclose(shares, [[0.9, 0.1], [0.75, 0.25], [0.5, 0.5]], atol=1e-6)


@pytest.mark.parametrize(("tau_start", "tau_end"), [(1.0, 1.0), (1.0, 5.0), (3.0, 1.0)])
def test_units_before_a_step_are_the_sum_of_the_steps(tau_start, tau_end):
    mixture = Mixture(
        MixtureConfig(tau_start, tau_end),
        ["asr", "sound", "asr"],
        [900, 50, 100],
        [5000, 3000, 9000],
        [None] * 3,
        60_000,
        40,
    )
    before = np.array([mixture.before(step) for step in range(101)])
    rates = np.diff(before, axis=0)
    assert (rates > 0).all() and (abs(rates.sum(axis=1) - 60_000) <= 3).all()
    shares = mixture.probabilities(np.arange(100))
    utterances = rates / np.array([5000, 3000, 9000])
    np.testing.assert_allclose(utterances / utterances.sum(axis=1, keepdims=True), shares, atol=1e-3)
    assert np.allclose(shares[40:], shares[40])  # constant after the stage's end


def two_tasks(**mixture):
    random = np.random.default_rng(0)
    index = table_index(
        random.uniform(1, 8, 1000), [100] * 10, tasks=("asr", "sound"), task_of=np.arange(1000) % 10 == 0
    )
    data = data_config("x", batch_seconds=60.0, mixture=MixtureConfig(**mixture))
    return Plan([index], data, "shrinking", 200)


def test_batches_follow_the_mixture():
    plan = two_tasks(tau_start=1.0, tau_end=4.0)
    assert plan.shares(0)["x/sound"] == pytest.approx(0.1)
    assert plan.shares(200)["x/sound"] == pytest.approx(1 / (1 + 9**0.25))
    for first in (0, 100, 170):
        steps = range(first, first + 30)
        batches = np.concatenate([plan.global_batch(step) for step in steps])
        share = (plan.indexes[0].samples["task"][batches["row"]] == 1).mean()
        assert abs(share - np.mean([plan.shares(step)["x/sound"] for step in steps])) < 0.03
    plan = two_tasks(task_weights={"asr": 1.0, "sound": 3.0})
    assert plan.shares(7) == {"x/asr": 0.25, "x/sound": 0.75}
    seen = Counter(key for step in range(150) for key in numbers(plan.global_batch(step)))
    assert set(seen.values()) == {1} and max(key[2] for key in seen) > 2  # the small task is on a later pass


def test_corpora_of_one_task_share_it_by_size_or_weight():
    random = np.random.default_rng(0)
    indexes = [table_index(random.uniform(1, 8, n), [n], folder=f) for n, f in ((300, "a"), (100, "b"))]
    data = data_config("a", "b", batch_seconds=60.0)
    assert Plan(indexes, data, "alignment", 10).shares(0) == pytest.approx({"a/asr": 0.75, "b/asr": 0.25})
    data.train[0].weight, data.train[1].weight = 1.0, 4.0
    assert Plan(indexes, data, "alignment", 10).shares(0) == pytest.approx({"a/asr": 0.2, "b/asr": 0.8})
    data.train[1].weight = None
    with pytest.raises(RecipeError, match="all or none need a `weight`"):
        Plan(indexes, data, "alignment", 10)


def test_a_share_of_a_corpus_is_drawn_by_id_and_the_smaller_lies_within_the_larger():
    index = table_index(np.random.default_rng(0).uniform(1, 8, 2000), [100] * 20)
    rows, prints = {}, set()
    for share in (0.1, 0.25, 1.0):
        for seed in (0, 1):  # other seeds shuffle alike many, the same utterances
            data = data_config("x", batch_seconds=500.0, seed=seed)
            data.train[0].share = share
            plan = Plan([index], data, "alignment", 10)
            rows.setdefault(share, set(plan.orders[0].rows.tolist()))
            assert rows[share] == set(plan.orders[0].rows.tolist())
            prints.add(plan.fingerprint)
    assert rows[0.1] < rows[0.25] < rows[1.0] and len(rows[1.0]) == 2000 and len(prints) == 6
    assert len(rows[0.1]) == pytest.approx(200, abs=50) and len(rows[0.25]) == pytest.approx(500, abs=70)
    for share in (0.0, -1.0, 1.5):
        data.train[0].share = share
        with pytest.raises(RecipeError, match="above 0, at most 1"):
            Plan([index], data, "alignment", 10)


def test_the_rest_of_a_corpus_is_what_its_share_leaves_out():
    index = table_index(np.random.default_rng(0).uniform(1, 8, 2000), [100] * 20)

    def plan(share, start):
        data = data_config("x", batch_seconds=500.0)
        data.train[0].share, data.train[0].share_from = share, start
        return Plan([index], data, "alignment", 10)

    parts = [
        set(plan(share, start).orders[0].rows.tolist())
        for share, start in ((0.5, 0.0), (0.25, 0.5), (0.25, 0.75))
    ]
    assert sum(map(len, parts)) == 2000 and set.union(*parts) == set(range(2000))
    assert [len(part) for part in parts] == pytest.approx([1000, 500, 500], abs=70)
    assert plan(0.5, 0.0).fingerprint != plan(0.5, 0.5).fingerprint
    for share, start in ((0.5, -0.1), (0.5, 0.6), (1.0, 0.1)):
        with pytest.raises(RecipeError, match="together at most 1"):
            plan(share, start)


@pytest.mark.parametrize(
    "folders, names",
    [
        (["/data/a", "/data/b"], ["a", "b"]),
        (["/a/train", "/b/train", "/c/x/train"], ["a/train", "b/train", "x/train"]),
        (["/1/x/train", "/2/x/train"], ["1/x/train", "2/x/train"]),
        (["/x/train", "/y/train", "/x/train"], ["x/train#1", "y/train", "x/train#2"]),
    ],
)
def test_corpora_of_one_name_are_distinguished(folders, names):
    index = table_index(np.full(40, 2.0), [20, 20])
    plan = Plan(
        [index] * len(folders),
        data_config(*folders, batch_seconds=20.0, micro_batch_seconds=10.0),
        "alignment",
        10,
    )
    assert list(plan.passes(5)) == [f"{name}/asr" for name in names]
    assert sum(plan.shares(5).values()) == pytest.approx(1)


def test_wrong_mixtures_are_named():
    with pytest.raises(RecipeError, match="no weight for task 'sound'"):
        two_tasks(task_weights={"asr": 1.0})
    with pytest.raises(RecipeError, match="tau must be above 0"):
        two_tasks(tau_start=0.0)


def test_fingerprint_names_what_the_plan_depends_on():
    def fingerprint(**changes):
        return make(
            ([20, 20], np.full(40, 2.0), {"batch_seconds": 20.0, "micro_batch_seconds": 10.0, **changes})
        ).fingerprint

    assert fingerprint() == fingerprint(workers=7, micro_batch_tokens=99, micro_batch_seconds=7.0)
    assert (
        len(
            {
                fingerprint(),
                fingerprint(seed=1),
                fingerprint(batch_seconds=21.0),
                fingerprint(shuffle_window_shards=1),
                fingerprint(max_seconds=9.0),
                fingerprint(bucket_seconds=9.0),
            }
        )
        == 6
    )


def test_the_same_batches_on_every_machine():
    """The order is made of fixed hashes: these numbers must never change."""
    plan = Plan(
        [table_index(np.linspace(1, 9, 60).astype(np.float32), [12] * 5)],
        data_config("x", batch_seconds=30.0, micro_batch_seconds=15.0, seed=3, shuffle_window_shards=2),
        "alignment",
        10,
    )
    assert plan.global_batch(2)["row"].tolist() == [23, 22, 21, 20, 29, 28, 27]
