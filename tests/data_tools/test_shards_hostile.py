"""Packed folders from strangers: any index, table or sample is read or is a ShardError of one line; no other
file is opened."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.shards import SAMPLE_DTYPE, ShardError, ShardIndex, ShardWriter, fingerprint, write_index
from tests.hostile import damaged_bytes, is_one_line, json_documents, only_inside, write_json
from train.preemption import DONE, WRONG_INPUT
from train.staging import main as stage

RECORD = {
    "id": "0",
    "corpus": "c",
    "task": "asr",
    "text": "words",
    "lang": "en",
    "duration": 1.0,
    "sample_rate": 16000,
    "prompt": "Why?",
    "messages": [{"role": "user", "content": "hm"}],
}
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def packed(folder, records=(RECORD, RECORD)):
    folder.mkdir(parents=True, exist_ok=True)
    summaries = []
    for shard in range(2):
        writer = ShardWriter(folder / f"x-{shard}.tar")
        for number, record in enumerate(records):
            writer.add(str(number), bytes(100), "flac", record)
        summaries.append(writer.close(f"x-{shard}.tar"))
    write_index(folder, "x", summaries)
    return folder


def read_all(folder):
    """Load and read every row: either fails as a named error. Returns the number of rows read."""
    try:
        index = ShardIndex.load(folder)
    except ShardError as error:
        assert is_one_line(error)
        return 0
    good = 0
    for row in range(len(index)):
        try:
            audio, record = index.read(row)
            assert isinstance(record["id"], str)
            good += 1
        except ShardError as error:
            assert is_one_line(error)
    index.close()
    return good


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    return packed(tmp_path / "packed")


@many
@given(data=st.data())
def test_any_index_is_read_or_refused_in_one_line(folder, data):
    index = folder / "index.json"
    kept = index.read_bytes()
    try:
        write_json(index, data.draw(json_documents(json.loads(kept))))
        with only_inside(folder):
            read_all(folder)
    finally:
        index.write_bytes(kept)


@many
@given(data=st.data())
def test_any_table_is_read_or_refused_in_one_line(folder, data):
    table = folder / "samples.npy"
    kept = table.read_bytes()
    try:
        table.write_bytes(data.draw(damaged_bytes(kept)))
        with only_inside(folder):
            read_all(folder)
    finally:
        table.write_bytes(kept)


@many
@given(data=st.data())
def test_any_sample_is_read_or_refused_in_one_line(folder, data):
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    text = json.dumps(data.draw(json_documents(RECORD))).encode()
    try:
        replace_sample(folder, 3, data.draw(damaged_bytes(text)) if data.draw(st.booleans()) else text)
        with only_inside(folder):
            assert read_all(folder) >= 3
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def replace_sample(folder, row, text):
    """Append another JSON for `row` to its shard, and let table and index point to it."""
    index, table = json.loads((folder / "index.json").read_text()), np.load(folder / "samples.npy")
    shard = folder / index["shardlist"][table["shard"][row]]["url"]
    table["json_offset"][row], table["json_size"][row] = shard.stat().st_size, len(text)
    with shard.open("ab") as file:
        file.write(text)
    index["shardlist"][table["shard"][row]]["filesize"] = shard.stat().st_size
    np.save(folder / "samples.npy", table)
    write_json(folder / "index.json", index)


@pytest.mark.parametrize(
    "text, says",
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON .nested too deeply"),
        (b'{"id": "\xff"}', "is not UTF-8"),
        (b"{}", "has no id"),
        (b'{"id": "a", "text": 5}', "has no text as text"),
        (b'{"id": "a", "task": ["asr"]}', "has no text as task"),
        (b'{"id": "\\ud800"}', "has no text as id"),
        (b'{"id": "a", "duration": NaN}', "has no number from 0 on as duration"),
        (b'{"id": "a", "messages": [{"role": "user", "content": null}]}', "has messages that are not a list"),
    ],
)
def test_a_wrong_sample_is_named(folder, text, says):
    replace_sample(folder, 3, text)
    with pytest.raises(ShardError, match=f"x-1.tar: JSON of sample 3 {says}"):
        ShardIndex.load(folder).read(3)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda i: i["shardlist"][1].update(url="../outside/file"), "is a path, not a plain file name"),
        (lambda i: i["shardlist"][1].update(url="/etc/passwd"), "is a path, not a plain file name"),
        (lambda i: i["shardlist"][1].update(url=".."), "begins with a dot"),
        (lambda i: i["shardlist"][1].update(url="x-0.tar"), "two files are named x-0.tar"),
        (lambda i: i["shardlist"][1].update(url="index.json"), "two files are named index.json"),
        (lambda i: i["shardlist"][1].update(url=5), "is not a file name"),
        (
            lambda i: i["shardlist"][0].update(sha256="../../x"),
            "'sha256' of shard x-0.tar is not 64 hexadecimal digits",
        ),
        (lambda i: i["shardlist"][0].update(filesize=2**63), "'filesize' of shard x-0.tar"),
        (lambda i: i["shardlist"][0].update(nsamples=True), "'nsamples' of shard x-0.tar"),
        (lambda i: i["shardlist"][0].pop("nsamples"), "'nsamples' of shard x-0.tar"),
        (lambda i: i.update(fingerprint="/elsewhere"), "'fingerprint' is not a sha256"),
        (lambda i: i.update(hours=float("nan")), "'hours' is not a number"),
        (lambda i: i.update(tasks={"asr": 1}), "'tasks' is not a list"),
        (lambda i: i.update(langs=[]), "names a lang that index.json does not list"),
        (lambda i: i.pop("codecs"), "'codecs' is missing"),
        (lambda i: i.update(rejected={"short": "many"}), "'rejected' is not an object of numbers"),
    ],
)
def test_an_index_that_pack_does_not_write_is_refused(folder, change, says):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    write_json(folder / "index.json", index)
    with pytest.raises(ShardError, match=says) as error, only_inside(folder):
        ShardIndex.load(folder)
    assert is_one_line(error.value)


@pytest.mark.parametrize(
    "column, value, says",
    [
        ("shard", 7, "row 2 is not in the order of the shards"),
        ("audio_offset", 2**63, "row 2 has audio beyond the end of its shard"),
        ("audio_offset", 2**64 - 50, "row 2 has audio beyond the end of its shard"),
        ("json_size", 2**32 - 1, "row 2 has json beyond the end of its shard"),
        ("task", 9, "row 2 names a task that index.json does not list"),
        ("codec", 9, "row 2 names a codec"),
        ("duration", np.inf, "row 2 has a duration that is negative or not finite"),
        ("duration", -1, "row 2 has a duration that is negative or not finite"),
    ],
)
def test_the_first_wrong_row_is_named(folder, column, value, says):
    table = np.load(folder / "samples.npy")
    table[column][2:] = value
    np.save(folder / "samples.npy", table)
    with pytest.raises(ShardError, match=says):
        ShardIndex.load(folder)


@pytest.mark.parametrize(
    "table",
    [
        np.zeros(4, np.float32),
        np.zeros((2, 2), SAMPLE_DTYPE),
        np.zeros((), SAMPLE_DTYPE),
        np.array([{}], object),
    ],
)
def test_another_array_is_no_table(folder, table):
    np.save(folder / "samples.npy", table, allow_pickle=True)
    with pytest.raises(ShardError, match="samples.npy"):
        ShardIndex.load(folder)


@pytest.mark.parametrize("name", ["x-1.tar", "index.json", "samples.npy"])
def test_links_out_of_the_folder_and_special_files_are_refused(folder, name):
    kept = (folder / name).read_bytes()
    (folder.parent / "outside" / name).write_bytes(kept)
    (folder / name).unlink()
    (folder / name).symlink_to(f"../outside/{name}")
    with pytest.raises(ShardError, match=f"{name} is a link to .*outside/{name}, outside its folder"):
        ShardIndex.load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ShardError, match=f"{name} is not a regular file"):
        ShardIndex.load(folder)
    (folder / name).unlink()
    (folder / name).write_bytes(kept)
    (folder.parent / "link").symlink_to(folder)  # the folder itself may be one
    assert len(ShardIndex.load(folder.parent / "link")) == 4


def test_an_empty_folder_of_shards_loads(tmp_path):
    writer = ShardWriter(tmp_path / "x-0.tar")
    write_index(tmp_path, "x", [writer.close("x-0.tar")])
    assert len(ShardIndex.load(tmp_path)) == 0


def recipe_of(tmp_path, folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stage: alignment\noutput: {tmp_path / 'out'}\ndata: {{train: [{{shards: {folder}}}]}}\n"
    )
    return str(recipe)


def test_staging_writes_nowhere_but_into_its_folder(folder, tmp_path, monkeypatch, capsys):
    recipe, local, victim = (
        recipe_of(tmp_path, folder),
        tmp_path / "node" / "shards",
        tmp_path / "node" / "profile",
    )
    monkeypatch.setenv("SOUNDWAVE_LOCAL_SHARDS", str(local))
    assert stage([recipe]) == DONE
    assert (
        sorted(p.name for p in local.glob("*/*")) == ["x-0.tar", "x-1.tar"]
        and local.stat().st_mode & 0o777 == 0o700
    )
    victim.write_text("mine")
    evil = tmp_path / "outside" / "profile"
    evil.write_text("evil")
    index = json.loads((folder / "index.json").read_text())
    digest = hashlib.sha256(b"evil").hexdigest()
    index["shardlist"].append({"url": "../outside/profile", "nsamples": 0, "filesize": 4, "sha256": digest})
    index["fingerprint"] = fingerprint(
        np.load(folder / "samples.npy"), [s["sha256"] for s in index["shardlist"]]
    )
    write_json(folder / "index.json", index)
    assert stage([recipe]) == WRONG_INPUT
    index["shardlist"].pop()
    index["fingerprint"] = str(victim.parent)
    write_json(folder / "index.json", index)
    assert stage([recipe]) == WRONG_INPUT
    assert victim.read_text() == "mine" and not list(tmp_path.rglob("*.tar.*"))
    errors = capsys.readouterr().err
    assert "is a path, not a plain file name" in errors and "'fingerprint' is not a sha256" in errors
    assert "Traceback" not in errors


def test_copies_that_others_could_write_are_not_used(folder, tmp_path, monkeypatch, capsys):
    local = tmp_path / "node"
    local.mkdir()
    local.chmod(0o777)
    monkeypatch.setenv("SOUNDWAVE_LOCAL_SHARDS", str(local))
    assert stage([recipe_of(tmp_path, folder)]) != DONE
    assert "can be written by other users" in capsys.readouterr().err and not list(local.iterdir())
    with pytest.raises(ShardError, match="SOUNDWAVE_LOCAL_SHARDS: .*can be written by other users"):
        ShardIndex.load(folder)
    local.chmod(0o755)
    assert stage([recipe_of(tmp_path, folder)]) == DONE and len(ShardIndex.load(folder)) == 4
