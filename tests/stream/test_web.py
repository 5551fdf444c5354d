"""Shards without an index, through pipes and HTTP: equal steps, each utterance once per pass and slot, faults
named."""

import functools
import http.server
import io
import json
import tarfile
import threading
from collections import Counter

import pytest
import torch

from recipe.config import Corpus, MixtureConfig, RecipeError
from stream import Plan, Stream
from stream import packed as stream_module
from stream import unindexed as web_module
from stream.collate import Collator
from stream.unindexed import UnindexedReader, micro_batches_per_step
from tests.stream.conftest import data_config, sound


def streamed(pattern, **settings):
    data = data_config(**{"batch_seconds": 12.0, "micro_batch_seconds": 4.0, **settings})
    data.train = [Corpus(shards=pattern)]
    return data


def pipe(folder):
    return f"pipe:cat {folder}/toy-{{000000..000004}}.tar"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (4, 2)])
def test_equal_steps_and_micro_batches_whatever_the_slots(
    packed, tokenizer, model_config, world_size, workers, monkeypatch
):
    monkeypatch.setattr(web_module, "SHUFFLE_BUFFER", 10)
    data = streamed(pipe(packed), workers=workers)
    counts, names = [], Counter()
    for rank in range(world_size):
        steps = list(Stream(data, "alignment", tokenizer, model_config, rank, world_size, 2, 7))
        assert [step.step for step in steps] == [2, 3, 4, 5, 6]
        counts.append([len(step.micro_batches) for step in steps])
        names.update(name for step in steps for batch in step.micro_batches for name in batch.ids)
        seconds = sum(step.seconds for step in steps) / 5
        assert abs(seconds - 12.0 / world_size) < 3.0 / world_size + 1
    assert all(count == counts[0] for count in counts)
    assert counts[0] == [micro_batches_per_step(data, world_size)] * 5
    assert len(names) > 10


@pytest.mark.parametrize(
    "slots", [1, 3, 5, 8]
)  # 8: more slots than shards, each takes its share of the samples
def test_slots_share_the_samples_without_overlap(packed, tokenizer, model_config, slots):
    data = streamed(pipe(packed))
    seen = Counter()
    for slot in range(slots):
        stream = Stream(data, "alignment", tokenizer, model_config, slot, slots, 0, 1)
        assert isinstance(stream.reader, UnindexedReader)
        source = stream.reader._samples(0, slot, slots, stream.reader.at[0].numpy(), [])
        for sample, number in source:
            if number == 2:
                break
            seen[sample["__key__"], number] += 1
    assert len(seen) == 2 * 23 and set(seen.values()) == {1}


def test_dropout_keys_differ_between_utterances_and_passes(packed, tokenizer, model_config, monkeypatch):
    monkeypatch.setattr(web_module, "SHUFFLE_BUFFER", 10)
    keys: dict[str, list[int]] = {}
    for step in Stream(streamed(pipe(packed)), "alignment", tokenizer, model_config, 0, 1, 0, 9):
        for batch in step.micro_batches:
            assert torch.equal(batch.audio_keys, batch.row_keys)
            for name, key in zip(batch.ids, batch.row_keys.tolist(), strict=True):
                keys.setdefault(name, []).append(key)
    drawn = [key for found in keys.values() for key in found]
    assert len(set(drawn)) == len(drawn) and max(map(len, keys.values())) > 1


def test_over_http(packed, tokenizer, model_config):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(packed))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        data = streamed(
            f"pipe:curl -s -f http://127.0.0.1:{server.server_port}/toy-{{000000..000004}}.tar", workers=1
        )
        steps = list(Stream(data, "shrinking", tokenizer, model_config, 0, 1, 0, 3))
    finally:
        server.shutdown()
        server.server_close()
    assert len(steps) == 3 and not any(step.rejected for step in steps)
    assert all(batch.input_ids.shape[1] > 0 for step in steps for batch in step.micro_batches)


def test_what_cannot_be_read_is_named(packed, tokenizer, model_config, tmp_path, monkeypatch):
    monkeypatch.setattr(web_module, "RETRY_PAUSES", (0.01,))
    (packed / "toy-000002.tar").unlink()
    shard = packed / "toy-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-60_000])
    stream = Stream(
        streamed(pipe(packed)),
        "alignment",
        tokenizer,
        model_config,
        0,
        1,
        0,
        3,
        rejected_path=tmp_path / "r.jsonl",
    )
    steps = list(stream)
    reasons = {record["id"]: record["reason"] for step in steps for record in step.rejected}
    assert any("toy-000002.tar after 0 samples" in name for name in reasons)
    assert any("toy-000003.tar after" in name for name in reasons)
    assert all(step.samples for step in steps) and (tmp_path / "r.jsonl").read_text().count("\n") >= 2
    for path in packed.glob("*.tar"):
        path.unlink()
    with pytest.raises(RecipeError, match="gives rank 0 nothing in a whole pass"):
        next(iter(Stream(streamed(pipe(packed)), "alignment", tokenizer, model_config, 0, 1, 0, 3)))


@pytest.mark.parametrize("stage", ["alignment", "shrinking"])
def test_a_clip_s_own_length_counts_where_its_json_tells_none(
    packed, tokenizer, model_config, tmp_path, stage
):
    """Tars of others: no `duration`, which tells a conversation that there is audio."""
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as old, tarfile.open(tmp_path / path.name, "w") as new:
            for member in old:
                content = old.extractfile(member).read()
                if member.name.endswith(".json"):
                    content = json.dumps(
                        {key: v for key, v in json.loads(content).items() if key != "duration"}
                    ).encode()
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    data = streamed(pipe(tmp_path), max_seconds=1.05)
    steps = list(Stream(data, stage, tokenizer, model_config, 0, 1, 0, 3))
    assert not any(step.rejected for step in steps) and all(step.samples for step in steps)
    assert max(int(batch.audio_lengths.max()) for step in steps for batch in step.micro_batches) <= 16800


@pytest.mark.parametrize(
    "strange, said",
    [
        ({"duration": "1.5"}, "seconds as `duration`"),
        ([1, 2], "an object"),
        ({"text": 7}, "text is no text"),
        ({"task": ["asr"]}, "task is no text"),
    ],
)
def test_json_of_others_costs_its_sample_not_the_run(
    packed, tokenizer, model_config, tmp_path, strange, said
):
    place = 0
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(tmp_path / path.name, "w") as new:
            for member in old:
                content = old.extractfile(member).read()
                if member.name.endswith(".json"):
                    place += 1
                    if place % 5 == 0:
                        content = json.dumps(
                            json.loads(content) | strange if isinstance(strange, dict) else strange
                        ).encode()
                        member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    steps = list(Stream(streamed(pipe(tmp_path)), "shrinking", tokenizer, model_config, 0, 1, 0, 3))
    reasons = [record["reason"] for step in steps for record in step.rejected]
    assert reasons and all(said in reason for reason in reasons) and all(step.samples for step in steps)


def test_settings_that_need_an_index_are_named(packed):
    for change, words in (
        ({"mixture": MixtureConfig(tau_end=2.0)}, "data.mixture needs an index"),
        ({"mixture": MixtureConfig(language_alpha=0.5)}, "data.mixture.language_alpha needs an index"),
        ({"cache_features": "x"}, "data.cache_features needs an index"),
    ):
        with pytest.raises(RecipeError, match=words):
            Plan.open(streamed(pipe(packed), **change), "alignment", 5)
    data = streamed(pipe(packed))
    data.train.append(Corpus(shards=str(packed)))
    with pytest.raises(RecipeError, match="mixes packed folders and streamed shards"):
        Plan.open(data, "alignment", 5)
    ours, other = (
        Plan.open(streamed(pattern), "alignment", 5).fingerprint for pattern in (pipe(packed), "pipe:x")
    )
    assert ours != other


CLIPS = 12


def foreign(kind):
    """Members of a shard that others made: [(name, bytes)] of CLIPS clips, and how many can be
    used."""

    def members(audio, meta, count=CLIPS):
        return [member for number in range(count) for member in (audio(number), meta(number))]

    clip, words = sound(0.5, container="wav"), {"text": "hello", "lang": "en"}
    told = [json.dumps({"id": f"u{n}", "task": "asr", **words}).encode() for n in range(CLIPS)]
    wav, meta = (lambda n: (f"u{n}.wav", clip)), (lambda n: (f"u{n}.json", told[n]))
    return {
        "role": (members(lambda n: (f"u{n}.audio.wav", clip), meta), CLIPS),
        "dotted": (
            members(lambda n: (f"sp0.9-u{n}.wav", clip), lambda n: (f"sp0.9-u{n}.json", told[n])),
            CLIPS,
        ),
        "texts": (members(wav, lambda n: (f"u{n}.txt", b"hello")), CLIPS),
        "no ids": (
            members(wav, lambda n: (f"u{n}.json", json.dumps({"sentence": "hello", "speaker": 7}).encode())),
            CLIPS,
        ),
        "unsorted": ([meta(n) for n in range(CLIPS)] + [wav(n) for n in range(CLIPS)], CLIPS),
        "of a mac": (
            [
                (f"{folder}{name}", data if not folder else b"")
                for name, data in members(wav, meta)
                for folder in ("._", "")
            ],
            CLIPS,
        ),
        "half of it unknown": (
            members(lambda n: (f"u{n}.wav" if n % 2 else f"u{n}.xyz", clip), meta),
            CLIPS // 2,
        ),
        "two files": (
            [(f"u{n}.{suffix}", clip) for n in range(CLIPS) for suffix in ("wav", "flac")]
            + [meta(n) for n in range(CLIPS)],
            0,
        ),
        "an answer without its audio": (
            members(
                lambda n: (f"u{n}.xyz", clip),
                lambda n: (
                    f"u{n}.json",
                    json.dumps({"task": "translation", "prompt": "Translate.", "response": "hallo"}).encode(),
                ),
            ),
            0,
        ),
        "texts of another encoding": (
            members(wav, lambda n: (f"u{n}.txt", b"se\xf1or" if n % 2 else b"hello")),
            CLIPS // 2,
        ),
    }[kind]


KINDS = [
    "role",
    "dotted",
    "texts",
    "no ids",
    "unsorted",
    "of a mac",
    "half of it unknown",
    "two files",
    "an answer without its audio",
    "texts of another encoding",
]


@pytest.mark.parametrize(("kind", "stage"), zip(KINDS, ["alignment", "shrinking"] * 5, strict=True))
def test_shards_of_others_are_read_or_named(
    kind, stage, tokenizer, model_config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(web_module, "SHUFFLE_BUFFER", 10)
    content, usable = foreign(kind)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = streamed(f"pipe:cat {tmp_path}/s.tar", batch_seconds=2.0, micro_batch_seconds=2.0)
    stream = Stream(data, stage, tokenizer, model_config, 0, 1, 0, 24)
    if not usable:
        with pytest.raises(
            RecipeError, match="none can be used; the last: (several audio members|no audio member)"
        ):
            list(stream)
        return
    steps = list(stream)
    names = {name for step in steps for batch in step.micro_batches for name in batch.ids}
    refused = {record["id"] for step in steps for record in step.rejected}
    assert len(names) == usable and len(refused) == CLIPS - usable
    assert not any(batch.audio_is_dummy for step in steps for batch in step.micro_batches)
    if kind in ("of a mac", "half of it unknown"):
        ignored = 2 * CLIPS if kind == "of a mac" else CLIPS // 2
        assert caplog.text.count("members:") == 1 and f"{ignored} ignored" in caplog.text


def test_what_waits_for_its_partner_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(web_module, "MOST_WAITING", 4100)
    names = [f"u{n}.wav" for n in range(10)] + [f"u{n}.json" for n in range(10)]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1000 if name.endswith("wav") else 2
            tar.addfile(info, io.BytesIO(b"{}" + bytes(998)))
    counts = Counter()
    groups = list(web_module.tar_groups(f"pipe:cat {tmp_path}/s.tar", counts))
    assert sum(group.is_complete for group in groups) == 4, "those that still waited"
    assert sum(len(group.members) for group in groups) == counts["grouped"] == counts["members"] == 20


ODD = [
    RuntimeError("x"),
    OverflowError("x"),
    RecursionError(),
    MemoryError(),
    KeyError("x"),
    TypeError("x"),
    AttributeError("x"),
    EOFError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    ZeroDivisionError(),
    OSError(5, "Input/output error"),
]


@pytest.mark.parametrize("place", ["decode", "augment.augmented", "check_length", "Collator.prepare"])
@pytest.mark.parametrize("indexed", [True, False])
def test_whatever_an_utterance_raises_is_its_reject(
    indexed, place, packed, tokenizer, model_config, monkeypatch
):
    """Packed folder and plain stream alike: a named line each, and the step continues with other utterances."""
    monkeypatch.setattr(web_module, "SHUFFLE_BUFFER", 10)
    module = stream_module if indexed else web_module
    owner, _, name = place.rpartition(".")
    target = Collator if owner == "Collator" else getattr(module, owner) if owner else module
    real, raised, calls = getattr(target, name), [], Counter()

    def sometimes(*arguments, **options):
        calls["all"] += 1
        if calls["all"] % 2 and len(raised) < len(ODD):
            raised.append(ODD[len(raised)])
            raise raised[-1]
        return real(*arguments, **options)

    monkeypatch.setattr(target, name, sometimes)
    data = streamed(str(packed) if indexed else pipe(packed))
    steps = list(Stream(data, "shrinking", tokenizer, model_config, 0, 1, 0, 5))
    reasons = [record["reason"] for step in steps for record in step.rejected]
    assert len(raised) == len(ODD) == len(reasons) and all(step.samples for step in steps)
    assert all(reason.startswith("it cannot be used: ") and "\n" not in reason for reason in reasons)
