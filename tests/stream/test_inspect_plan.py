"""The look before training: what the command prints is what the plan holds."""

import json

import numpy as np
import pytest

from stream.inspect_plan import describe_step, effective_number, main, shuffle_quality
from stream.plan import Plan
from tests.stream.conftest import data_config, table_index


def test_the_command(packed, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "data": {
                    "train": [{"shards": str(packed)}],
                    "batch_seconds": 8,
                    "micro_batch_seconds": 4,
                    "max_seconds": 2.35,
                },
                "optim": {"steps": 10},
            }
        )
    )
    assert main([str(recipe), "--steps", "3", "--ranks", "2"]) == 0
    output = capsys.readouterr().out
    assert (
        "toy/asr" in output
        and "shuffle quality" in output
        and "2 x longer than data.max_seconds=2.35" in output
    )
    assert (
        main(["--json", str(recipe), "data.seed=3", "--steps", "3", "--first", "2", "--ranks", "2", "--ids"])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    plan = Plan.open(data_config(packed, max_seconds=2.35, seed=3), "alignment", 10)
    assert facts["fingerprint"] == plan.fingerprint and [row["step"] for row in facts["steps"]] == [2, 3, 4]
    for row in facts["steps"]:
        batch = plan.global_batch(row["step"])
        assert row["utterances"] == len(batch) and row["seconds"] == pytest.approx(
            float(batch["seconds"].sum())
        )
        assert facts["ids"][str(row["step"])] == [f"toy/asr-{number}" for number in batch["row"]]
        assert 0 <= row["padding"] < 1 and row["micro_batches"] >= 1
    assert main([str(recipe), "data.batchseconds=3"]) == 2
    assert "did you mean 'data.batch_seconds'" in capsys.readouterr().err
    assert main([str(recipe), "data.train=[{shards: 'pipe:cat x.tar'}]"]) == 2
    assert "streamed without an index" in capsys.readouterr().err


def test_profile_reads_the_steps(packed, tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"llm": {"name": str(tmp_path / "llm")}},
                "data": {"train": [{"shards": str(packed)}], "batch_seconds": 8, "workers": 1},
            }
        )
    )
    assert main([str(recipe), "--profile", "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["profile"]
    assert found["samples_per_second"] > 0 and set(found["worker_seconds"]) == {
        "read",
        "decode",
        "prepare",
        "collate",
    }
    assert found["worker_seconds"]["decode"] > 0


def test_shuffle_quality_is_lower_for_a_small_window():
    assert effective_number(np.array([1, 1, 2, 2])) == pytest.approx(2) and effective_number(
        np.zeros(9)
    ) == pytest.approx(1)
    durations = np.random.default_rng(0).uniform(2, 12, 4000).astype(np.float32)

    def quality(window):
        data = data_config("x", batch_seconds=400.0, micro_batch_seconds=100.0, shuffle_window_shards=window)
        return shuffle_quality(Plan([table_index(durations, [100] * 40)], data, "alignment", 10), 10)

    assert quality(40) > 0.9 > quality(8) > quality(2)


def test_mixed_sources_are_counted():
    index = table_index(np.full(200, 2.0), [200], tasks=("asr", "sound"), task_of=np.arange(200) % 4 == 0)
    row = describe_step(Plan([index], data_config("x", batch_seconds=40.0), "shrinking", 10), 0, 2)
    assert (
        row["tasks"] == {"x/asr": pytest.approx(15, abs=1), "x/sound": pytest.approx(5, abs=1)}
        and row["tokens"] > 19 * 48
    )
