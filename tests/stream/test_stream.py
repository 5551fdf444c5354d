"""Batches as a rank gets them, from real packed folders."""

import io
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from core.keys import signed_key64
from core.samples import answer_of
from recipe.config import Corpus, MixtureConfig, RecipeError
from stream import EvalStream, Plan, Stream, TooManyRejected, validation_samples, worst_case_batch
from stream import packed as stream_module
from stream.plan import PLANNED, load_index
from stream.rejected import RejectedLog
from tests.stream.conftest import data_config, record, sound, table_index, write_folder


def consumed(data, stage, tokenizer, model_config, world_size, start, steps):
    """ids by step, over all ranks, and micro-batches by rank and step."""
    ids, counts = {step: [] for step in range(start, steps)}, []
    for rank in range(world_size):
        stream = Stream(data, stage, tokenizer, model_config, rank, world_size, start, steps)
        got = list(stream)
        assert [step.step for step in got] == list(range(start, steps))
        for step in got:
            ids[step.step] += [name for batch in step.micro_batches for name in batch.ids]
        counts.append([len(step.micro_batches) for step in got])
    assert all(count == counts[0] for count in counts)
    return {step: sorted(names) for step, names in ids.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_do_not_change_the_batches(packed, tokenizer, model_config, workers):
    alone = consumed(data_config(packed), "alignment", tokenizer, model_config, 1, 0, 9)
    assert (
        consumed(data_config(packed, workers=workers), "alignment", tokenizer, model_config, 3, 0, 9) == alone
    )
    later = consumed(data_config(packed, workers=workers), "alignment", tokenizer, model_config, 2, 5, 9)
    assert later == {step: alone[step] for step in range(5, 9)}


def test_replayed_text_turns_have_their_share_and_resume_exactly(packed, mixed, tokenizer, model_config):
    """Stage 3 with a text-only source (docs/fine-tune.md): task_weights shares out utterances, on any ranks."""
    data = data_config(packed, mixed, mixture=MixtureConfig(task_weights={"asr": 0.7, "text": 0.3}))
    data.train[0].tasks, data.train[1].tasks = ["asr"], ["text"]
    plan = Plan.open(data, "sft", 40, model_config)
    batches = [plan.global_batch(step) for step in range(40)]
    text = sum(int((batch["seconds"] == 0).sum()) for batch in batches)
    assert text / sum(map(len, batches)) == pytest.approx(0.3, abs=0.05)
    alone = consumed(data, "sft", tokenizer, model_config, 1, 0, 9)
    assert consumed(data, "sft", tokenizer, model_config, 2, 4, 9) == {s: alone[s] for s in range(4, 9)}
    assert consumed(data, "sft", tokenizer, model_config, 3, 0, 9) == alone


def dropout_keys(data, tokenizer, model_config, world_size, steps):
    """Count (step, id, the row's key, its audio's or None) over all ranks."""
    found = Counter()
    for rank in range(world_size):
        for step in Stream(data, "shrinking", tokenizer, model_config, rank, world_size, 0, steps):
            for batch in step.micro_batches:
                if not batch.ids:
                    assert batch.row_keys.tolist() == batch.audio_keys.tolist() == [0]
                    continue
                audios = iter(batch.audio_keys.tolist() if not batch.audio_is_dummy else [])
                found.update(
                    (step.step, name, key, None if task == "text" else next(audios))
                    for name, key, task in zip(batch.ids, batch.row_keys.tolist(), batch.tasks, strict=True)
                )
                assert next(audios, None) is None
    return found


def test_dropout_keys_belong_to_utterance_and_pass_alone(mixed, packed, tokenizer, model_config):
    """Not to the rank, the micro-batch or the worker; a clip's audio has its conversation's. Two corpora have
    the same ids."""
    data = data_config(mixed, packed)
    alone = dropout_keys(data, tokenizer, model_config, 1, 14)
    assert (
        dropout_keys(
            data_config(mixed, packed, micro_batch_seconds=2.5, workers=1), tokenizer, model_config, 3, 14
        )
        == alone
    )
    assert all(audio in (None, row) for _, _, row, audio in alone) and any(
        audio is None for *_, audio in alone
    )
    plan, expected, places = Plan.open(data, "shrinking", 14), Counter(), set()
    for step in range(14):
        for entry in plan.global_batch(step):
            name = plan.indexes[entry["corpus"]].read(int(entry["row"]))[1]["id"]
            place = int(entry["corpus"]), int(entry["row"]), int(entry["epoch"])
            places.add(place)
            expected[step, name, signed_key64("utterance", *place)] += 1
    assert expected == Counter({(step, name, key): number for (step, name, key, _), number in alone.items()})
    assert {epoch for *_, epoch in places} >= {0, 1} and len({key for *_, key in expected}) == len(places)


def test_every_utterance_once_per_pass(packed, tokenizer, model_config):
    plan = Plan.open(data_config(packed), "alignment", 100)
    seen = Counter()
    steps = 0
    while plan.passes(steps)["toy/asr"] < 3:
        for entry in plan.global_batch(steps):
            seen[int(entry["row"]), int(entry["epoch"])] += 1
        steps += 1
    assert set(seen.values()) == {1}
    assert {key for key in seen if key[1] < 3} == {(row, epoch) for row in range(23) for epoch in range(3)}


def test_waveforms_and_targets_are_those_of_the_files(packed, tokenizer, model_config):
    step = next(iter(Stream(data_config(packed), "alignment", tokenizer, model_config, 0, 1, 0, 1)))
    for batch in step.micro_batches:
        assert batch.input_ids.shape == (len(batch.ids), 0) and batch.features is None
        for row, name in enumerate(batch.ids):
            number = int(name.split("-")[1])
            audio, _ = soundfile.read(io.BytesIO(sound(0.3 + 0.1 * number, number)), dtype="float32")
            length = int(batch.audio_lengths[row])
            assert torch.equal(batch.waveforms[row, :length], torch.from_numpy(audio))
            assert not batch.waveforms[row, length:].any()
            target = batch.ctc_targets[row, : batch.ctc_target_lengths[row]]
            assert tokenizer.decode(target).strip() == f"the words of clip {number}"
    assert step.seconds == pytest.approx(
        sum(float(b.audio_lengths.sum()) / 16000 for b in step.micro_batches)
    )


def test_mixed_batches_of_stage_two(mixed, tokenizer, model_config):
    audio = tokenizer.convert_tokens_to_ids("<audio_patch>")
    kinds = set()
    for step in Stream(
        data_config(mixed, micro_batch_seconds=2.0), "shrinking", tokenizer, model_config, 0, 2, 0, 6
    ):
        for batch in step.micro_batches:
            heard = (batch.input_ids == audio).sum()
            assert batch.audio_is_dummy == (heard == 0)
            assert len(batch.waveforms) == max(int(heard), 1)
            answers = [tokenizer.decode(row[row != -100]) for row in batch.labels]
            for task, answer, name in zip(batch.tasks, answers, batch.ids, strict=True):
                number = name.split("-")[1]
                expected = {"text": "Four.", "translation": "les mots", "asr": f"the words of clip {number}"}[
                    task
                ]
                assert answer.strip() == expected + "<|end|>"
                kinds.add(task)
    assert kinds == {"asr", "translation", "text"}


def test_more_ranks_than_utterances_get_dummies(packed, tokenizer, model_config):
    data = data_config(packed, batch_seconds=3.0)
    for stage in ("alignment", "shrinking"):
        batches = [
            next(iter(Stream(data, stage, tokenizer, model_config, rank, 16, 0, 1))).micro_batches
            for rank in range(16)
        ]
        assert {len(b) for b in batches} == {1}
        dummies = [b[0] for b in batches if b[0].audio_is_dummy]
        assert dummies
        for dummy in dummies:
            assert (
                dummy.ids == [] and dummy.ctc_count == 0 and dummy.ce_count == 0 and len(dummy.waveforms) == 1
            )


def faulty(tmp_path):
    """40 clips: one of no samples, one with NaN, one without text, one that is no audio, and the last shard
    cut short."""
    samples = []
    for number in range(40):
        seconds = 1.0 + 0.02 * number
        entry, audio, codec = record(number, seconds), sound(seconds, number, container="wav"), "wav"
        if number == 3:
            audio = sound(0, container="wav")
        if number == 7:
            wave = np.full(20000, np.nan, np.float32)
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, 16000, format="WAV", subtype="FLOAT")
            audio = buffer.getvalue()
        if number == 11:
            entry["text"] = " ... "
        if number == 15:
            audio = b"not audio at all" * 50
        samples.append((entry, audio, codec))
    return write_folder(tmp_path / "faulty", samples, per_shard=10)


def test_faults_cost_one_named_sample_each(tmp_path, tokenizer, model_config):
    folder = faulty(tmp_path)
    data = data_config(folder, batch_seconds=16.0, ctc_text="lower_no_punctuation")
    streams = [
        Stream(
            data,
            "alignment",
            tokenizer,
            model_config,
            rank,
            2,
            0,
            4,
            rejected_path=tmp_path / "rejected.jsonl",
        )
        for rank in range(2)
    ]
    shard = folder / "toy-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-40000])  # cut while the run is under way: its last sample is lost
    runs = [list(stream) for stream in streams]
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert set(reasons) == {"asr-3", "asr-7", "asr-11", "asr-15", "row 39 of toy-000003.tar"}
    assert (
        "no samples" in reasons["asr-3"]
        and "NaN" in reasons["asr-7"]
        and "no transcript" in reasons["asr-11"]
    )
    assert "undecodable" in reasons["asr-15"] and "ends inside" in reasons["row 39 of toy-000003.tar"]
    names = [name for run in runs for step in run for batch in step.micro_batches for name in batch.ids]
    planned = sum(len(streams[0].plan.global_batch(step)) for step in range(4))
    assert len(names) == planned and not set(names) & set(reasons)
    for line in lines:
        assert line["replaced_by"] in names
    again = list(Stream(data, "alignment", tokenizer, model_config, 0, 1, 0, 4, plan=streams[0].plan))
    assert Counter(name for step in again for batch in step.micro_batches for name in batch.ids) == Counter(
        names
    )


def test_past_the_share_the_run_stops_with_the_list(tmp_path, tokenizer, model_config):
    """Judged over all ranks."""
    data = data_config(faulty(tmp_path), batch_seconds=16.0, max_rejected_share=0.002)
    rejected = samples = 0
    for rank in range(2):
        stream = Stream(
            data, "alignment", tokenizer, model_config, rank, 2, 0, 4, rejected_path=tmp_path / "r.jsonl"
        )
        for step in stream:
            rejected, samples = rejected + len(step.rejected), samples + step.samples
    assert (
        rejected >= 3
        and stream.rejected.too_many(2, samples) is None
        and stream.rejected.too_many(19, 9_981) is None
    )
    told = stream.rejected.too_many(rejected, samples)
    assert isinstance(told, TooManyRejected)
    assert f"{rejected} of {rejected + samples} utterances" in str(told)
    assert all(f"asr-{number} (" in str(told) for number in (3, 7, 15))


def test_a_broken_utterance_is_named_once_by_all_ranks_and_restarts(tmp_path):
    broken = {"id": "a", "corpus": "c", "reason": "why", "step": 3, "replaced_by": "b"}
    for _ in range(2):
        log = RejectedLog(tmp_path / "r.jsonl", 0.01)
        log.add([broken, {**broken, "step": 4}])
        log.add([{**broken, "step": 5}, {**broken, "id": "other"}])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["id"], line["step"]) for line in lines] == [("a", 3), ("other", 3)]


def test_what_the_index_rules_out_is_named(packed, tokenizer, model_config, tmp_path):
    data = data_config(packed, min_seconds=0.45, max_seconds=2.35)
    stream = Stream(
        data, "alignment", tokenizer, model_config, 0, 1, 0, 1, rejected_path=tmp_path / "r.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"].split()[0] for line in lines} == {
        "asr-0": "shorter",
        "asr-1": "shorter",
        "asr-21": "longer",
        "asr-22": "longer",
    }
    assert stream.plan.utterances.tolist() == [19]
    with pytest.raises(RecipeError, match="nothing that stage 'alignment' can train on: 23 x longer"):
        Plan.open(data_config(packed, max_seconds=0.2), "alignment", 1)


def test_a_split_is_evaluated_once_with_equal_batches(packed, tokenizer, model_config):
    for world_size in (1, 3, 7):
        streams = [
            EvalStream(
                str(packed),
                tokenizer,
                model_config,
                "shrinking",
                batch_seconds=5.0,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        assert len({len(stream) for stream in streams}) == 1
        names = []
        for stream in streams:
            for batch, samples in stream:
                assert batch.ids == [sample["id"] for sample in samples]
                names += batch.ids
                for row in range(len(samples)):
                    text = tokenizer.decode(batch.input_ids[row][batch.attention_mask[row] == 1])
                    assert text.endswith("<|start|>assistant\n") and (batch.labels == -100).all()
        assert sorted(names) == sorted(f"asr-{n}" for n in range(23))
        assert sum(stream.total for stream in streams) == 23


def test_eval_limit_and_done(packed, tokenizer, model_config):
    stream = EvalStream(
        str(packed),
        tokenizer,
        model_config,
        "alignment",
        limit=6,
        done=lambda sample: sample["id"] == "asr-0",
    )
    names = sorted(name for batch, _ in stream for name in batch.ids)
    assert stream.total == 5 and names == sorted(f"asr-{n}" for n in (3, 7, 11, 15, 19))


def test_held_out_share_of_the_pack_that_is_trained_on(packed, tokenizer, model_config):
    data = data_config(packed)
    data.train[0].share = 0.7
    data.valid = [Corpus(shards=str(packed), share=0.3, share_from=0.7)]
    trained = set(Plan.open(data, "alignment", 1).orders[0].rows.tolist())
    pairs = validation_samples(data, "alignment", tokenizer, model_config, 0, 1, 100)
    held_out = {int(name.removeprefix("asr-")) for batch, _ in pairs for name in batch.ids}
    index = load_index(str(packed))
    trained = {int(index.read(row)[1]["id"].removeprefix("asr-")) for row in trained}
    assert held_out and not trained & held_out and trained | held_out == set(range(23))


def test_validation_references(mixed, tokenizer, model_config):
    data = data_config(mixed)
    data.valid = data.train
    pairs = validation_samples(data, "shrinking", tokenizer, model_config, 0, 1, 30)
    found = {sample["id"]: answer_of(sample) for _, samples in pairs for sample in samples}
    assert (
        found["text-4"] == "Four."
        and found["translation-3"] == "les mots"
        and found["asr-0"] == "the words of clip 0"
    )
    assert len(found) == 30


def test_worst_case_batch_fills_the_budgets(packed, tokenizer, model_config):
    data = data_config(packed, micro_batch_seconds=9.0, max_seconds=2.5, micro_batch_tokens=900)
    batch = worst_case_batch(data, "shrinking", tokenizer, model_config)
    assert batch.waveforms.shape == (3, 40000) and batch.input_ids.shape == (3, 300)
    assert worst_case_batch(data, "alignment", tokenizer, model_config).input_ids.shape == (3, 0)


@pytest.mark.parametrize("micro, shape", [(9.0, (4, 40000)), (10.0, (5, 35555)), (2.0, (1, 40000))])
def test_worst_case_batch_knows_that_clips_are_slowed(packed, tokenizer, model_config, micro, shape):
    """At 0.9, 9 s last 10 s: four clips of 2.5 s, not three. A clip that would last longer than max_seconds
    keeps its speed."""
    data = data_config(packed, micro_batch_seconds=micro, max_seconds=2.5, speed_perturb=[0.9, 1.0, 1.1])
    assert worst_case_batch(data, "alignment", tokenizer, model_config).waveforms.shape == shape


def test_wrong_settings_are_named(packed, tmp_path, caplog):
    with pytest.raises(RecipeError, match="pack the corpus first"):
        Plan.open(data_config(tmp_path / "nowhere"), "alignment", 1)
    plan = Plan.open(data_config(packed, batch_seconds=1.0), "alignment", 1)
    assert "batch_seconds=1 is below the longest utterance (2.5 s)" in caplog.text
    assert all(len(plan.global_batch(step)) > 0 for step in range(60))
    data = data_config(packed)
    data.train[0].tasks = ["emotion"]
    with pytest.raises(RecipeError, match="no task 'emotion'; it has asr"):
        Plan.open(data, "alignment", 1)


def test_replacement_is_a_function_of_the_plan(packed):
    plan = Plan.open(data_config(packed), "alignment", 1)
    entry = plan.global_batch(0)[0]
    first = [plan.replacement(entry, attempt)["row"] for attempt in (1, 2, 3)]
    again = Plan.open(data_config(packed), "alignment", 1)
    assert first == [again.replacement(entry, attempt)["row"] for attempt in (1, 2, 3)]
    assert entry.dtype == PLANNED and entry["row"] not in first


def test_what_replaces_a_text_only_turn_is_not_longer():
    index = table_index(np.zeros(40), [10] * 4, tasks=("text",))
    index.samples["audio_size"], index.samples["characters"], index.samples["target_characters"] = (
        0,
        0,
        np.arange(15, 615, 15),
    )
    plan = Plan([index], data_config("x", batch_seconds=1000.0), "sft", 1)
    said = index.samples["target_characters"]
    for entry in plan.global_batch(0):
        chosen = [plan.replacement(entry, attempt)["row"] for attempt in (1, 2, 3)]
        assert (
            said[chosen] <= max(said[entry["row"]], 60)
        ).all()  # of the shortest, what is shortest of what was drawn


def test_open_files_are_dealt_out_among_corpora(monkeypatch):
    limits = {"now": (1024, 1024)}
    monkeypatch.setattr(stream_module.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(stream_module.resource, "setrlimit", lambda _, new: limits.update(now=new))
    kept = []
    indexes = [SimpleNamespace(keep_open=kept.append) for _ in range(20)]
    stream_module.share_open_files(indexes)
    assert set(kept) == {32} and limits["now"] == (1024, 1024)
    limits["now"] = (1024, 4096)
    kept.clear()
    stream_module.share_open_files(indexes)
    assert set(kept) == {64} and limits["now"] == (4096, 4096), "as far as it goes"
