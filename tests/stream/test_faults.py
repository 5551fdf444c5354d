"""Storage that stalls or loses files, workers that hang or die: retried, named, replaced, and never waited
for without a word."""

import logging
import multiprocessing
import os
import signal
import threading
import time

import pytest

from stream import Stream, StreamStalled
from stream import reader as reader_module
from stream.loader import Loader
from stream.plan import load_index
from stream.reader import read_with_retry
from stream.rejected import BrokenSample
from tests.stream.conftest import data_config


def test_a_stall_is_waited_out(packed, caplog):
    index, shard = load_index(str(packed)), packed / "toy-000001.tar"
    away = shard.with_suffix(".away")
    shard.rename(away)
    threading.Timer(0.3, lambda: away.rename(shard)).start()
    audio, meta, retries = read_with_retry(index, 7, pauses=(0.1, 0.2, 0.4, 0.8, 1.6))
    assert meta["id"] == "asr-7" and audio[:4] == b"fLaC" and retries >= 1
    assert "trying again in 0.1 s" in caplog.text


def test_wrong_content_is_not_read_again(packed):
    index, shard = load_index(str(packed)), packed / "toy-000004.tar"
    os.truncate(shard, 20_000)
    began = time.monotonic()
    with pytest.raises(BrokenSample, match="ends inside sample 22"):
        read_with_retry(index, 22, pauses=(9.0,))
    assert time.monotonic() - began < 5


def test_a_vanished_shard_is_named_and_replaced(packed, tokenizer, model_config, tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "RETRY_PAUSES", (0.01, 0.01))
    data = data_config(packed)
    stream = Stream(
        data, "alignment", tokenizer, model_config, 0, 1, 0, 4, rejected_path=tmp_path / "rejected.jsonl"
    )
    lost = set(range(10, 15))
    (packed / "toy-000002.tar").unlink()
    steps = list(stream)
    planned = [stream.plan.global_batch(step) for step in range(4)]
    hit = [int(row) for batch in planned for row in batch["row"] if row in lost]
    rejected = [record for step in steps for record in step.rejected]
    assert hit and {record["row"] for record in rejected} >= set(hit)
    assert all(
        "cannot be read" in record["reason"] and record["shard"] == "toy-000002.tar" for record in rejected
    )
    assert (
        sum("after 3 attempt(s)" in record["reason"] for record in rejected) == 1
    )  # the others did not wait again
    assert [step.samples for step in steps] == [len(batch) for batch in planned]


@pytest.fixture
def stuck(packed, tokenizer, model_config):
    """A stream whose second shard blocks whoever opens it, as a dead mount does."""
    stream = Stream(
        data_config(packed, shuffle_window_shards=1), "alignment", tokenizer, model_config, 0, 1, 0, 9
    )
    (packed / "toy-000001.tar").unlink()
    os.mkfifo(packed / "toy-000001.tar")
    return stream


def test_the_watchdog_names_a_stuck_worker(stuck, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(StreamStalled) as error:
        for _ in Loader(stuck.reader, stuck._jobs(), 1, 2, slow_after=0.2, stuck_after=1.0):
            pass
    assert "data worker 0 has been at sample" in caplog.text and "toy-000001.tar" in caplog.text
    assert "was stuck for 1 s and was ended, at sample" in str(error.value) and "toy-000001.tar" in str(
        error.value
    )
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_named(stuck):
    def end_it():
        while not multiprocessing.active_children():
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=end_it, daemon=True).start()
    with pytest.raises(
        StreamStalled, match=r"worker 0 \(pid \d+\) is dead, exit code -9, at sample \d+ of .*toy-000001.tar"
    ):
        for _ in Loader(
            stuck.reader,
            stuck._jobs(),
            1,
            2,
        ):
            pass


def test_workers_ignore_the_batch_systems_signals(packed, tokenizer, model_config):
    stream = Stream(data_config(packed, workers=2), "alignment", tokenizer, model_config, 0, 1, 0, 6)
    steps = iter(stream)
    next(steps)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        for name in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(child.pid, name)
    assert len(list(steps)) == 5
    stream.close()
    assert not multiprocessing.active_children()
