"""The GPU check's items: limits, order of the report, continuation. The items here need no GPU."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks.gpu_check import ITEMS, Item, run_items

FACTS = {"gpu": "a GPU", "commit": "abc", "load_before": 0.0, "versions": {"torch": ""}, "python": ""}


def measured() -> list[dict]:
    return [{"check": "a check", "outcome": "measured", "seconds": 1.0, "why": ""}]


def test_each_item_has_its_limit_and_results_are_kept(tmp_path):
    out, mark = tmp_path / "report.json", tmp_path / "child"

    def hangs() -> list[dict]:
        subprocess.run(["sh", "-c", f"sleep 3; touch {mark}"])
        return measured()

    def fails() -> list[dict]:
        raise ValueError("two\nlines")

    def dies() -> list[dict]:
        import os

        os._exit(3)

    items = (
        Item("good", 5, measured),
        Item("hangs", 0.5, hangs),
        Item("fails", 5, fails),
        Item("dies", 5, dies),
    )
    began = time.monotonic()
    rows = run_items(items, FACTS, out, again=False)
    assert time.monotonic() - began < 3
    assert [row["outcome"] for row in rows] == ["measured", "failed", "failed", "failed"]
    assert [row["why"] for row in rows[1:]] == ["not done after 0.5 s", "ValueError: two", "exit code 3"]
    assert list(json.loads(out.read_text())["items"]) == ["good", "hangs", "fails", "dies"]
    time.sleep(3)
    assert not mark.exists(), "what an item has started is killed with it"


def test_a_second_call_runs_what_is_not_done(tmp_path):
    out, calls = tmp_path / "report.json", tmp_path / "calls"

    def counted() -> list[dict]:
        with open(calls, "a") as file:
            file.write("x")
        return measured()

    first, second = Item("first", 5, counted), Item("second", 5, counted)
    run_items((first,), FACTS, out, again=False)
    run_items((first, second), FACTS, out, again=False)
    assert Path(calls).read_text() == "xx"
    run_items((first, second), FACTS | {"gpu": "another"}, out, again=False)
    assert Path(calls).read_text() == "xxxx"
    run_items((first, second), FACTS | {"gpu": "another"}, out, again=True)
    assert Path(calls).read_text() == "xxxxxx"


def test_the_first_items_fit_into_five_minutes():
    names = [item.name for item in ITEMS]
    first = names.index("generation") + 1
    assert sum(item.seconds for item in ITEMS[:first]) <= 300
    assert {"op: parity", "op: speed", "stage 2 step"} <= set(names[:first])
