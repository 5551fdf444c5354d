"""data.mixture.language_alpha: shares of languages, against exact expectations."""

from collections import Counter

import numpy as np
import pytest

from recipe.config import Corpus, DataConfig, MixtureConfig
from stream.assign import Budgets, assign
from stream.inspect_plan import language_lines, main
from stream.plan import Plan
from tests.stream.conftest import record, sound, table_index, write_folder

HOURS = {"en": 20.0, "de": 4.0, "gl": 0.5}
MEAN_SECONDS = {"en": 8.0, "de": 3.0, "gl": 5.0}  # hours and numbers of utterances differ
BATCH = 300.0


def durations_of(code: str) -> np.ndarray:
    """Lengths whose sum is the language's hours within an utterance."""
    count = round(HOURS[code] * 3600 / MEAN_SECONDS[code])
    drawn = np.random.default_rng(len(code)).uniform(0.5, 1.5, count) * MEAN_SECONDS[code]
    return (drawn * (HOURS[code] * 3600 / drawn.sum())).astype(np.float32)


def labelled(durations, langs: list[str], names: list[str], folder: str, **more):
    index = table_index(durations, [len(durations)], folder=folder, **more)
    index.langs = names
    index.samples["lang"] = [names.index(lang) for lang in langs]
    return index


def folders(kind: str, spelling=lambda code: code) -> list:
    """The same audio as a folder for each language, or as one folder with all languages in random order."""
    if kind == "apart":
        return [
            labelled(durations_of(code), [spelling(code)] * len(durations_of(code)), [spelling(code)], code)
            for code in HOURS
        ]
    durations = np.concatenate([durations_of(code) for code in HOURS])
    langs = [spelling(code) for code in HOURS for _ in durations_of(code)]
    order = np.random.default_rng(3).permutation(len(durations))
    names = sorted({*langs}, reverse=True)
    return [labelled(durations[order], [langs[at] for at in order], names, "all")]


def plan_of(indexes, alpha, steps=400, weights=None, **mixture) -> Plan:
    weights = weights or [None] * len(indexes)
    data = DataConfig(
        train=[Corpus(shards=str(index.folder), weight=w) for index, w in zip(indexes, weights, strict=True)],
        batch_seconds=BATCH,
        mixture=MixtureConfig(language_alpha=alpha, **mixture),
    )
    return Plan(indexes, data, "shrinking", steps)


def seconds_by_language(plan: Plan, steps: range) -> Counter:
    """Audio of each language in the batches themselves, read from the index."""
    seconds: Counter = Counter()
    for step in steps:
        for entry in plan.global_batch(step):
            index = plan.indexes[entry["corpus"]]
            seconds[index.langs[index.samples["lang"][entry["row"]]]] += float(entry["seconds"])
    return seconds


@pytest.mark.parametrize("kind", ["apart", "mixed"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_audio_of_languages_is_in_proportion_to_hours_to_the_power_of_alpha(kind, alpha):
    plan, steps = plan_of(folders(kind), alpha), range(400)
    given = seconds_by_language(plan, steps)
    powers = {code: hours**alpha for code, hours in HOURS.items()}
    for code in HOURS:
        expected = BATCH * len(steps) * powers[code] / sum(powers.values())
        scheduled = sum(
            plan.mixture.before(len(steps))[at] / 1000
            for at, language in enumerate(plan.languages)
            if language == code
        )
        assert scheduled == pytest.approx(expected, abs=0.001 * len(steps))  # whole milliseconds a step
        # Utterances are whole, and begin in the step's stretch of their language.
        assert given[code] == pytest.approx(expected, rel=0.01, abs=2 * MEAN_SECONDS[code])


@pytest.mark.parametrize("kind", ["apart", "mixed"])
def test_the_table_has_hours_share_and_passes(kind):
    plan = plan_of(folders(kind), 0.5)
    table = plan.language_table(400)
    assert [row["language"] for row in table] == ["en", "de", "gl"]
    total = sum(hours**0.5 for hours in HOURS.values())
    for row in table:
        hours = HOURS[row["language"]]
        assert row["hours"] == pytest.approx(hours, rel=1e-3)
        assert row["share"] == pytest.approx(hours**0.5 / total, rel=1e-3)
        assert row["passes"] == pytest.approx(hours**0.5 / total * 400 * BATCH / 3600 / hours, rel=2e-3)
    lines = language_lines(plan, 400)
    assert lines[1] == "languages, data.mixture.language_alpha=0.5" and len(lines) == 6


def test_each_utterance_of_a_language_comes_once_per_pass():
    plan = plan_of(folders("mixed"), 0.0)
    seen = Counter((int(e["row"]), int(e["epoch"])) for step in range(300) for e in plan.global_batch(step))
    assert set(seen.values()) == {1} and max(epoch for _, epoch in seen) > 2


def test_a_step_does_not_depend_on_the_steps_before_or_on_ranks():
    """Resume at any step, on any number of ranks, gives the same utterances."""
    once, again = plan_of(folders("mixed"), 0.3), plan_of(folders("mixed"), 0.3)
    batches = [once.global_batch(step) for step in range(40)]
    for step in (39, 17, 0):
        batch = again.global_batch(step)
        assert np.array_equal(batch, batches[step])
        for ranks in (1, 2, 7):
            dealt = assign(batch["seconds"], batch["positions"], ranks, Budgets.of(again.data))
            rows = [at for rank in dealt for group in rank for at in group]
            assert sorted(rows) == list(range(len(batch)))


def test_spellings_of_one_language_are_one_language():
    odd = folders("apart", lambda code: {"en": "en-US", "de": "German", "gl": "gl_es"}[code])
    plain = plan_of(folders("apart"), 0.5)
    assert plan_of(odd, 0.5).language_table(400) == plain.language_table(400)


def test_samples_without_a_language_are_a_group_of_their_own():
    index = labelled(np.full(600, 4.0), ["de"] * 400 + [""] * 200, ["", "de"], "some")
    plan = plan_of([index], 0.0)
    assert {row["language"]: row["share"] for row in plan.language_table(100)} == pytest.approx(
        {"de": 0.5, "none": 0.5}
    )
    assert language_lines(plan, 100)[-1] == "none: samples that were packed without `lang`"


def test_weights_divide_a_language_among_its_folders():
    indexes = [
        labelled(np.full(400, 4.0), [code] * 400, [code], name)
        for name, code in (("a", "en"), ("b", "en"), ("c", "de"))
    ]
    plan = plan_of(indexes, 1.0, weights=[1.0, 3.0, 50.0])
    assert plan.shares(0) == pytest.approx(
        {"a/asr/en": 2 / 3 / 4, "b/asr/en": 2 / 3 * 3 / 4, "c/asr/de": 1 / 3}
    )


def test_tasks_keep_their_shares():
    index = labelled(
        np.full(1000, 4.0),
        ["en"] * 500 + ["de"] * 500,
        ["en", "de"],
        "two",
        tasks=("asr", "sound"),
        task_of=np.r_[np.zeros(450), np.ones(50), np.zeros(100), np.ones(400)],
    )
    plan = plan_of([index], 0.5, task_weights={"asr": 3.0, "sound": 1.0})
    shares = plan.shares(0)
    assert shares["two/asr/en"] + shares["two/asr/de"] == pytest.approx(0.75)
    assert shares["two/asr/en"] / shares["two/asr/de"] == pytest.approx((450 / 100) ** 0.5)
    assert shares["two/sound/en"] / shares["two/sound/de"] == pytest.approx((50 / 400) ** 0.5)


def test_without_alpha_nothing_changes_and_the_fingerprint_names_it():
    plain = plan_of(folders("mixed"), None)
    assert plain.names == ["all/asr"] and plain.language_table(10) == [] and language_lines(plain, 10) == []
    prints = {plan_of(folders("mixed"), alpha).fingerprint for alpha in (None, 0.3, 0.5)}
    assert len(prints) == 3


def test_two_packed_folders_and_a_mixed_one_on_the_command_line(tmp_path, capsys):
    def clips(codes):
        return [
            (record(at, 1.0, lang=code, corpus=code), sound(1.0, at), "flac") for at, code in enumerate(codes)
        ]

    write_folder(tmp_path / "en", clips(["en"] * 12))
    write_folder(tmp_path / "mixed", clips(["de", "en"] * 4))
    (tmp_path / "recipe.yaml").write_text(
        "stage: alignment\n"
        f"data: {{batch_seconds: 10, mixture: {{language_alpha: 0}}, train: [{{shards: {tmp_path}/en}}, "
        f"{{shards: {tmp_path}/mixed}}]}}\n"
        "optim: {steps: 40}\n"
    )
    assert main([str(tmp_path / "recipe.yaml"), "--steps", "1"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:3] in ("en ", "de ")}
    assert rows == {"en": ["0.00", "50.0%", "12.50"], "de": ["0.00", "50.0%", "50.00"]}
