"""Packed folders at URLs: the same samples, batches and order as local ones, whatever the server does.

The servers are one of our own with faults (range_server.py), which also takes the part of Google's, and
moto's S3 server (s3_server.py).
"""

import collections
import json
import os
import shutil
import socket
import time

import pytest

pytest.importorskip("obstore", reason="make setup EXTRAS=stores")

from core.object_store import StoreError, check_url, folder_name, is_folder_url, joined
from data_tools.copy_packed import copy
from data_tools.copy_packed import main as copy_main
from data_tools.shards import ShardError, ShardIndex
from data_tools.verify import check
from recipe.config import RecipeError
from stream import Stream
from stream.plan import is_plain_stream, load_index
from stream.reader import read_with_retry
from stream.rejected import UnreadableSample
from tests.stream.conftest import data_config, record, sound, write_folder
from tests.stream.range_server import RangeServer
from tests.stream.s3_server import s3, s3_packages

__all__ = ["s3", "s3_packages"]  # fixtures


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and no credentials of whoever runs it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SOUNDWAVE_SHARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(packed):
    server = RangeServer(packed.parent)
    yield server
    server.shutdown()
    server.server_close()


def same(one: ShardIndex, other: ShardIndex) -> bool:
    return all(one.read(row) == other.read(row) for row in range(len(other)))


def forget(index: ShardIndex) -> None:
    """Empty the cache of samples; the index stays."""
    index.close()
    for path in [*index.folder.glob("*.rows"), *index.folder.glob("*.data")]:
        path.unlink()


def ids(data, tokenizer, model_config, ranks: int, start: int, steps: int) -> list[list[str]]:
    """Sorted ids of each step over all ranks."""
    found = [[] for _ in range(start, steps)]
    for rank in range(ranks):
        stream = Stream(data, "alignment", tokenizer, model_config, rank, ranks, start, steps)
        for step in stream:
            found[step.step - start] += [name for batch in step.micro_batches for name in batch.ids]
    return [sorted(names) for names in found]


def test_a_url_is_the_folder_that_it_serves(server, packed):
    remote, local = ShardIndex.load(f"{server.url}/toy/"), ShardIndex.load(packed)
    assert same(remote, local)
    assert (remote.fingerprint, remote.damaged) == (local.fingerprint, [])
    reads = server.asked.copy()
    assert reads["GET", "index.json"] == reads["GET", "samples.npy"] == 1
    assert sum(n for (method, name), n in reads.items() if method == "GET" and name.endswith(".tar")) == 23
    again = ShardIndex.load(f"{server.url}/toy")
    assert same(again, local)
    assert server.asked - reads == collections.Counter({("GET", "index.json"): 1})


@pytest.mark.long
def test_ranks_may_change_on_the_way(server, packed, tokenizer, model_config):
    local = data_config(packed, batch_seconds=6.0, micro_batch_seconds=4.0)
    remote = data_config(f"{server.url}/toy", batch_seconds=6.0, micro_batch_seconds=4.0, workers=2)
    expected = ids(local, tokenizer, model_config, 1, 0, 9)
    found = [
        *ids(remote, tokenizer, model_config, 2, 0, 3),
        *ids(remote, tokenizer, model_config, 1, 3, 6),
        *ids(remote, tokenizer, model_config, 2, 6, 9),
    ]
    assert found == expected and all(expected)


@pytest.mark.long
def test_samples_are_asked_for_ahead(packed, tokenizer, model_config):
    """23 clips at 0.15 s a request: one after the other they take more than 3 s."""
    server = RangeServer(packed.parent, delay=0.15)
    data = data_config(f"{server.url}/toy", batch_seconds=12.0, micro_batch_seconds=12.0, workers=0)
    stream = Stream(data, "alignment", tokenizer, model_config, 0, 1, 0, 3)
    began, samples = time.perf_counter(), 0
    for step in stream:
        samples += step.samples
    assert samples > 15
    assert time.perf_counter() - began < 0.1 * samples
    server.shutdown()


@pytest.mark.parametrize("fault", [429, 503, "cut"])
def test_a_passing_fault_is_retried(server, packed, fault):
    remote, local = ShardIndex.load(f"{server.url}/toy"), ShardIndex.load(packed)
    server.faults = [fault]
    assert remote.read(3) == local.read(3)
    assert server.asked["GET", "toy-000000.tar"] == 2


@pytest.mark.long
def test_a_server_that_hangs_costs_the_time_limit(server, packed, monkeypatch):
    monkeypatch.setenv("SOUNDWAVE_STORE_TIMEOUT", "0.5")
    remote, local = ShardIndex.load(f"{server.url}/toy"), ShardIndex.load(packed)
    server.faults, began = ["hang"], time.perf_counter()
    assert remote.read(3) == local.read(3)
    assert 0.5 <= time.perf_counter() - began < 5


@pytest.mark.long
@pytest.mark.parametrize(
    "fault, reason",
    [
        (403, "access is denied"),
        (404, "no such object"),
        (503, "HTTP status 503"),
        ("cut", "closed before the whole answer"),
    ],
)
def test_a_lasting_fault_is_one_named_sample(server, fault, reason):
    remote = ShardIndex.load(f"{server.url}/toy")
    server.faults = [fault] * 50
    with pytest.raises(UnreadableSample, match=reason):
        read_with_retry(remote, 3, pauses=(0.0,))


def test_changed_objects_are_named(server, packed):
    remote = ShardIndex.load(f"{server.url}/toy")
    shard = packed / "toy-000000.tar"
    good = shard.read_bytes()
    offset = int(remote.samples["audio_offset"][2])
    shard.write_bytes(good[:offset] + b"other" + good[offset + 5 :])
    with pytest.raises(ShardError, match="sample 2 of .*toy-000000.tar: .* it was changed"):
        remote.read(2)
    shard.write_bytes(good + bytes(512))
    with pytest.raises(ShardError, match=f"has {len(good) + 512} bytes now, the index says {len(good)}"):
        remote.read(1)
    shard.write_bytes(good)
    assert remote.read(2)[1]["id"] == "asr-2"


@pytest.mark.long
def test_changed_text_is_noticed_without_audio(tmp_path):
    samples = [(record(n, None, "text", prompt="Question?", response="Yes."), None, "") for n in range(4)]
    folder = write_folder(tmp_path / "text", samples)
    server = RangeServer(tmp_path)
    remote = ShardIndex.load(f"{server.url}/text")
    shard = folder / "toy-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"text-1"', b'"text-9"'))
    assert remote.read(0)[1]["id"] == "text-0"
    with pytest.raises(ShardError, match="sample 1 .*it was changed"):
        remote.read(1)
    server.shutdown()


@pytest.mark.long
def test_a_stream_replaces_what_cannot_be_read(server, packed, tokenizer, model_config, tmp_path):
    data = data_config(f"{server.url}/toy", batch_seconds=6.0, micro_batch_seconds=6.0, workers=0)
    data.max_rejected_share = 0.5
    shard = packed / "toy-000001.tar"
    broken = bytearray(shard.read_bytes())
    index = ShardIndex.load(packed)
    start = int(index.samples["audio_offset"][6])
    broken[start : start + 4] = b"oops"
    shard.write_bytes(bytes(broken))
    log = tmp_path / "rejected.jsonl"
    import stream.reader

    pauses, stream.reader.RETRY_PAUSES = stream.reader.RETRY_PAUSES, (0.0,)
    try:
        steps = list(Stream(data, "alignment", tokenizer, model_config, 0, 1, 0, 6, rejected_path=log))
    finally:
        stream.reader.RETRY_PAUSES = pauses
    assert len(steps) == 6
    (line,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert "it was changed" in line["reason"] and line["replaced_by"].startswith("asr-")


@pytest.mark.long
def test_an_index_that_changes_is_read_again(server, packed):
    before = ShardIndex.load(f"{server.url}/toy")
    shutil.rmtree(packed)
    write_folder(packed, [(record(n, 0.5), sound(0.5, n), "flac") for n in range(7)])
    after = ShardIndex.load(f"{server.url}/toy")
    assert (len(before), len(after)) == (23, 7)
    assert same(after, ShardIndex.load(packed))


@pytest.mark.long
def test_a_table_of_another_index_is_refused_and_not_kept(server, packed, tmp_path):
    other = write_folder(tmp_path / "other", [(record(n, 0.5), sound(0.5, n), "flac") for n in range(23)])
    table = (packed / "samples.npy").read_bytes()
    shutil.copy(other / "samples.npy", packed / "samples.npy")
    with pytest.raises(ShardError, match="samples.npy"):
        ShardIndex.load(f"{server.url}/toy")
    (packed / "samples.npy").write_bytes(table)
    assert len(ShardIndex.load(f"{server.url}/toy")) == 23


@pytest.mark.long
def test_missing_and_cut_shards_are_named_before_training(server, packed):
    shard = packed / "toy-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    (line,) = ShardIndex.load(f"{server.url}/toy").damaged
    assert line.startswith(f"{server.url}/toy/toy-000002.tar has {len(whole) - 512} bytes")
    shutil.rmtree(os.environ["SOUNDWAVE_SHARD_CACHE"])
    shard.unlink()
    with pytest.raises(ShardError, match="toy-000002.tar: there is no such object"):
        ShardIndex.load(f"{server.url}/toy")
    with pytest.raises(RecipeError, match="there is no such object: give a URL"):
        load_index(f"{server.url}/elsewhere")


@pytest.mark.long
def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/toy"
        with pytest.raises(ShardError, match="the server cannot be reached"):
            ShardIndex.load(url)


@pytest.mark.long
def test_the_cache_is_bounded_and_spoilt_bytes_are_read_again(server, packed, cache, monkeypatch):
    size = sum(shard["filesize"] for shard in ShardIndex.load(packed).shards)
    monkeypatch.setenv("SOUNDWAVE_SHARD_CACHE_GB", f"{0.5 * size / 1e9}")
    remote, local = ShardIndex.load(f"{server.url}/toy"), ShardIndex.load(packed)
    for _ in range(3):
        assert same(remote, local)
    used = sum(path.stat().st_blocks * 512 for path in cache.glob("*/*.data"))
    assert 0 < used < 0.8 * size
    monkeypatch.setenv("SOUNDWAVE_SHARD_CACHE_GB", "1")
    remote = ShardIndex.load(f"{server.url}/toy")
    assert same(remote, local)
    for path in cache.glob("*/*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    assert same(remote, local)
    monkeypatch.setenv("SOUNDWAVE_SHARD_CACHE_GB", "0")
    asked = server.asked.copy()
    remote = ShardIndex.load(f"{server.url}/toy")
    assert same(remote, local) and sum((server.asked - asked).values()) >= 24


@pytest.mark.long
def test_reading_survives_a_fork_and_the_end_of_its_client(server, packed):
    remote, local = ShardIndex.load(f"{server.url}/toy"), ShardIndex.load(packed)
    assert remote.read(0) == local.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.read(1) == local.read(1) else 1)
    assert os.waitpid(child, 0)[1] == 0
    remote._remote._store._process.kill()
    assert read_with_retry(remote, 2, pauses=(0.0,))[:2] == local.read(2)


@pytest.mark.long
def test_evaluation_and_verify_read_urls(server, packed, tokenizer, model_config, monkeypatch):
    from evaluation.run import shard_folder

    assert shard_folder(server.url, "toy") == f"{server.url}/toy"
    assert check(f"{server.url}/toy", 5, 1) == []
    index = ShardIndex.load(f"{server.url}/toy")
    assert index.location == f"{server.url}/toy"


@pytest.mark.long
def test_copies_end_with_the_index_and_resume(server, packed, tmp_path, capsys):
    target = f"{server.url}/copied"
    assert copy_main([str(packed), target]) == 0
    assert "5 of 5 shards" in capsys.readouterr().out
    assert same(ShardIndex.load(target), ShardIndex.load(packed))
    (packed.parent / "copied" / "toy-000001.tar").unlink()
    assert "1 of 5 shards" in copy(str(packed), target)
    assert "5 of 5 shards" in copy(target, str(tmp_path / "back"))
    for path in packed.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert copy_main([str(tmp_path / "nowhere"), target]) == 2


def test_which_urls_are_packed_folders():
    folders = ["s3://bucket/train", "gs://b/p/train/", "https://host/data/train-960", "s3://b"]
    streams = [
        "pipe:cat a.tar",
        "s3://bucket/a-{000..010}.tar",
        "https://host/a.tar.gz",
        "gs://b/a.tgz",
        "https://host/train-{0..3}",
        "https://host/a::https://host/b",
    ]
    assert [is_folder_url(url) and not is_plain_stream(url) for url in folders] == [True] * 4
    assert [is_plain_stream(url) for url in streams] == [True] * 6
    assert not is_plain_stream("data/train")
    assert folder_name("s3://b/shards/train/") == folder_name("shards/train") == "train"
    assert joined("s3://b/p/", "x") == "s3://b/p/x" and joined("a", "x") == "a/x"


@pytest.mark.parametrize(
    "url",
    ["https://me:secret@host/train", "https://host/train?X-Amz-Signature=secret", "s3://key@b/x#secret"],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url):
    with pytest.raises(StoreError, match="holds credentials"):
        check_url(url)
    with pytest.raises(RecipeError, match="holds credentials") as error:
        load_index(url)
    assert not any(hidden in str(error.value) for hidden in ("secret", "me:", "key@"))


@pytest.mark.long
def test_a_password_of_netrc_is_sent_and_not_shown(server, packed, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ShardIndex.load(f"{server.url}/toy")
    assert server.headers[-1]["authorization"] == "Basic bWU6c2VjcmV0"


def test_without_the_package_the_extra_is_named(server, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ShardError, match="make setup EXTRAS=stores"):
        ShardIndex.load(f"{server.url}/toy")


@pytest.mark.long
def test_googles_store_is_read_with_its_own_configuration(server, packed, monkeypatch, tmp_path):
    account = {"gcs_base_url": server.url, "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps(account | {"private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    shutil.copytree(packed, tmp_path / "bucket" / "toy")
    remote = ShardIndex.load("gs://bucket/toy")
    assert same(remote, ShardIndex.load(packed))


# --------------------------------------------------------------------------------------------- moto's S3 server


@pytest.mark.long
def test_a_real_s3_server_holds_a_packed_folder(s3, packed, tokenizer, model_config, tmp_path):
    copy(str(packed), "s3://bucket/shards/toy")
    remote, local = ShardIndex.load("s3://bucket/shards/toy"), ShardIndex.load(packed)
    assert same(remote, local)
    here = data_config(packed, batch_seconds=6.0, micro_batch_seconds=4.0)
    there = data_config("s3://bucket/shards/toy", batch_seconds=6.0, micro_batch_seconds=4.0, workers=2)
    forget(remote)
    assert ids(there, tokenizer, model_config, 2, 0, 4) == ids(here, tokenizer, model_config, 1, 0, 4)
    copy("s3://bucket/shards/toy", str(tmp_path / "back"))
    assert (tmp_path / "back" / "index.json").read_bytes() == (packed / "index.json").read_bytes()
    with pytest.raises(ShardError) as error:
        ShardIndex.load("s3://bucket/shards/other")
    assert "hidden-key" not in str(error.value) and "AKIA" not in str(error.value)
