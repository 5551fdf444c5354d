"""The plan: equal shards, nothing lost or doubled, the same whoever makes it, and memory that does not
grow."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpora import Entry, Rejection
from data_tools.filters import Filters, SampleFilter
from data_tools.plan import Layout, make_plan, plan_once, shard_entries


def entries(count, seconds=lambda i: 1.0 + i % 7, **more):
    return [
        Entry(id=f"u{i}", audio=f"/a/{i}.wav", text=f"text {i}", corpus="c", duration=seconds(i), **more)
        for i in range(count)
    ]


def planned(folder, items, layout=None, filters=None):
    plan = make_plan(folder, [items], SampleFilter(filters or Filters()), layout or Layout(), {})
    return plan, [shard_entries(folder, shard) for shard in range(plan["shards"])]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 300),
    seed=st.integers(0, 5),
    megabytes=st.floats(0.02, 5),
    shuffle=st.sampled_from(["samples", "recordings", "none"]),
)
def test_every_sample_is_in_one_shard_and_shards_are_equal(tmp_path_factory, count, seed, megabytes, shuffle):
    folder = tmp_path_factory.mktemp("plan")
    plan, shards = planned(
        folder / "p", entries(count), Layout(seed=seed, shuffle=shuffle, shard_megabytes=megabytes)
    )
    ids = [entry.id for _, here in shards for entry in here]
    assert Counter(ids) == Counter(f"u{i}" for i in range(count)) and plan["samples"] == count
    assert [first for first, _ in shards] == np.cumsum([0] + [len(here) for _, here in shards])[
        :-1
    ].tolist(), "numbers run on"
    sizes = [sum(entry.duration for entry in here) * 18000 + len(here) * 2200 for _, here in shards]
    assert max(sizes) - min(sizes) <= 3 * (7 * 18000 + 2200), (
        "no small remainder: shards differ by a few samples"
    )
    if shuffle == "none":
        assert ids == [f"u{i}" for i in range(count)]


def test_shuffle_mixes_the_whole_corpus_and_hangs_on_the_seed(tmp_path):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, shards = planned(tmp_path / name, entries(4000), Layout(seed=seed, shard_megabytes=10))
        orders.append([int(entry.id[1:]) for _, here in shards for entry in here])
    assert orders[0] == orders[1] != orders[2]
    order = np.array(orders[0])
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.06
    assert all(abs(part.mean() - 2000) < 250 for part in np.split(order, 8)), (
        "every stretch holds the whole corpus"
    )


def test_order_of_a_sample_hangs_on_its_id_alone(tmp_path):
    whole = [e.id for _, here in planned(tmp_path / "a", entries(200))[1] for e in here]
    fewer = [e.id for _, here in planned(tmp_path / "b", entries(200)[50:])[1] for e in here]
    assert fewer == [name for name in whole if int(name[1:]) >= 50]


def test_recordings_stay_together_in_their_order(tmp_path):
    items = [
        Entry(
            id=f"r{r}-{i}",
            audio=f"/{r}.wav",
            offset=float(i),
            duration=1.0,
            text="x",
            corpus="c",
            recording=f"r{r}",
        )
        for i in range(20)
        for r in range(30)
    ]
    _, shards = planned(tmp_path / "p", items, Layout(shuffle="recordings", shard_megabytes=2))
    places = [(entry.recording, entry.offset) for _, here in shards for entry in here]
    runs = [name for k, (name, _) in enumerate(places) if k == 0 or places[k - 1][0] != name]
    assert len(runs) == 30 and len(shards) > 3
    assert all([offset for name, offset in places if name == f"r{r}"] == sorted(range(20)) for r in range(30))
    assert sum(len({entry.recording for entry in here}) for _, here in shards) == 30, (
        "no recording is opened for two shards"
    )


def test_a_recording_larger_than_a_shard_is_cut(tmp_path):
    items = [
        Entry(id=f"{i}", audio="/long.wav", offset=float(i), duration=1.0, text="x", corpus="c")
        for i in range(500)
    ]
    plan, shards = planned(tmp_path / "p", items, Layout(shuffle="recordings", shard_megabytes=1))
    assert plan["shards"] > 4 and max(len(here) for _, here in shards) < 150


def test_shards_by_hours(tmp_path):
    plan, shards = planned(tmp_path / "p", entries(1000, lambda i: 36.0), Layout(shard_hours=1.0))
    assert plan["shards"] == 10 and [len(here) for _, here in shards] == [100] * 10


def test_without_a_wanted_size_small_corpora_still_feed_many_readers():
    layout = Layout()
    assert [layout.shards(size, 0) for size in (1e3, 5e6, 40e6, 200e6, 20e9)] == [1, 2, 10, 32, 79]


def test_duplicates_are_named_wherever_they_stand(tmp_path, monkeypatch):
    from data_tools import plan as module

    monkeypatch.setattr(
        module._doubles, "__defaults__", (None, 16)
    )  # the tables of hashes are read many times
    monkeypatch.setattr(module._Repeated.__init__, "__defaults__", (16,))
    items = entries(100) + [
        Entry(id=f"u{i}", audio="/b.wav", text="again", corpus="c", duration=1.0) for i in (3, 50, 3)
    ]
    items += [Entry(id="u3", audio="/b.wav", text="another corpus", corpus="d", duration=1.0)]
    plan, shards = planned(tmp_path / "p", items)
    assert plan["samples"] == 101 and plan["rejected"] == {"duplicate_id": 3}
    assert all(entry.text != "again" for _, here in shards for entry in here)
    hashed = [
        Entry(id=f"{i}", audio=f"/{i}.wav", text="x", corpus="c", duration=1.0, sound_hash=f"{i % 40}")
        for i in range(100)
    ]
    plan, shards = planned(tmp_path / "q", hashed, filters=Filters(drop_duplicates=True))
    assert plan["rejected"] == {"duplicate_audio": 60} and sorted(
        int(e.id) for _, here in shards for e in here
    ) == list(range(40))
    same_id = [
        Entry(id=name, audio=f"/{sound}.wav", text="x", corpus="c", duration=1.0, sound_hash=sound)
        for name, sound in (("a", "one"), ("a", "two"), ("b", "two"))
    ]
    plan, shards = planned(tmp_path / "r", same_id, filters=Filters(drop_duplicates=True))
    assert plan["rejected"] == {"duplicate_id": 1}, "what is refused for its id has no claim on its sound"
    assert sorted(e.id for _, here in shards for e in here) == ["a", "b"]


def test_faults_are_counted_and_written(tmp_path):
    plan, _ = planned(
        tmp_path / "p", [*entries(3), Rejection("x", "bad_row", "why"), Entry(id="y", audio="/y", corpus="c")]
    )
    lines = [json.loads(line) for line in (tmp_path / "p" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [("x", "bad_row"), ("y", "no_text")]
    assert plan["rejected"] == {"bad_row": 1, "no_text": 1} and plan["samples"] == 3


def test_only_one_of_many_planners_works_and_a_dead_one_is_replaced(tmp_path):
    made, plans = [], []

    def make(own):
        made.append(threading.get_ident())
        own.mkdir(parents=True)
        time.sleep(0.5)
        (own / "plan.json").write_text('{"samples": 1}')
        return {}

    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "plan.lock").write_text(f"{os.uname().nodename} {dead.pid}")
    threads = [
        threading.Thread(target=lambda: plans.append(plan_once(tmp_path / "plan", make))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        plans == [{"samples": 1}] * 4 and len(made) == 1 and [p.name for p in tmp_path.iterdir()] == ["plan"]
    )


def test_a_silent_planner_on_another_machine_is_replaced(tmp_path):
    def make(own):
        own.mkdir(parents=True)
        (own / "plan.json").write_text("{}")

    (tmp_path / "plan.lock").write_text("elsewhere 1")
    started = time.monotonic()
    assert plan_once(tmp_path / "plan", make, patience_seconds=0.6) == {} and time.monotonic() - started > 0.6


MEMORY = """
import resource, sys
from pathlib import Path
from data_tools.corpora import Entry
from data_tools.filters import SampleFilter
from data_tools.plan import Layout, make_plan
count = int(sys.argv[2])
def items():
    for i in range(count):
        yield Entry(id=f"utterance-{i}", audio=f"/data/{i}.flac", text="words " * 20, corpus="c", duration=5.0)
plan = make_plan(Path(sys.argv[1]), [items()], SampleFilter(), Layout(), {})
assert plan["samples"] == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    megabytes = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for count in (10_000, 400_000)
    ]
    assert megabytes[1] - megabytes[0] < 60, f"{megabytes} MB for 10,000 and 400,000 entries"
