"""Reading a recipe: layers, one line for whatever is wrong, paths, and what a model folder decides."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.options import choice, location, names_or_pattern, number, numbers, problems, text
from model.config import SoundwaveConfig, official_switches
from recipe.config import HealthConfig, Recipe, RecipeError, known_keys, load_recipe
from train.checks import check, warnings_of, workers_warning
from train.health import Health

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "data.train=[{shards: somewhere}]"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def error_of(*args) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(*args)
    line = str(raised.value)
    assert line and "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------------- whateve

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "${oc.env:NOT_SET}",
            "${seed}",
            "${nothing.there}",
            "${",
            "???",
            "~",
            "~no-such-user/x",
            "$NOT_SET",
            "$HOME/x",
            "1e3",
            ".inf",
            "0x10",
            "2020-01-01",
            "all-linear",
            "(",
            "x" * 300,
            "a\nb",
            "pipe:cat x",
            "null",
        ]
    ),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(), st.booleans()), inner, max_size=3),
        st.lists(
            st.fixed_dictionaries(
                {"shards": st.just("x")}, optional=dict.fromkeys(("weight", "tasks", "share"), inner)
            ),
            max_size=2,
        ),
    ),
)
KEYS = st.one_of(
    st.sampled_from(known_keys()), st.text(string.ascii_letters + "._", max_size=8), st.just("base")
)


def nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(key=KEYS, value=VALUES)
@example("optim.betas", [0.9])
@example("data.mixture.task_weights", {1: 2})
@example("loss", None)
@example("output", "${oc.env:NOT_SET}/run")
@example("seed", -1)
@example("data.speed_perturb", ["fast"])
@example("data.speed_perturb", [{"shards": "x"}])
@example("data.noise_snr_db", [[1, 2], 3])
def test_any_value_for_any_key_is_a_recipe_or_one_line(tmp_path, key, value):
    try:
        content = yaml.safe_dump(nested(key, value), allow_unicode=True)
        content.encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return  # no file can hold that
    try:
        recipe = load_recipe(write(tmp_path, content))
        check(recipe)
    except RecipeError as error:
        assert str(error) and "\n" not in str(error) and "Traceback" not in str(error)
    else:
        assert not list(problems(recipe))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        st.text(max_size=20),
        st.builds("{}={}".format, KEYS, st.text(max_size=10)),
        st.builds("{}={}".format, KEYS, VALUES.map(str)),
    )
)
@example("data.train=[{shards")
@example("=5")
@example("a..b=1")
@example("data.train[0].weight=2")
def test_any_override_is_one_or_one_line(tmp_path, override):
    try:
        load_recipe(write(tmp_path, ""), [override])
    except RecipeError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "content, words",
    [
        ("- stage: alignment", "is no mapping"),
        ("just a sentence", "unknown key 'just a sentence'"),
        ("3", "is no mapping"),
        ("a: &a [*a]", "is not valid YAML"),
        ("stage: [alignment", "is not valid YAML: while parsing"),
        ("base: r.yaml", "its base leads back to itself ("),
        ("base: [other.yaml]", "base is ['other.yaml']: give the name of one YAML file"),
        ("base:", "base is null: give the name"),
        ("base: 3", "base is 3: give the name"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: ${oc.env:NOT_SET}", "base: the environment has no NOT_SET"),
        (
            "output: ${oc.env:NOT_SET}/run",
            "output: the environment has no NOT_SET: set it, or give a default: ${oc.env:NOT_SET,",
        ),
        ("output: $NOT_SET/run", "output is '$NOT_SET/run': the environment has no NOT_SET"),
        ("output: ~no-user-of-this-name/run", "no such user's home folder"),
        ("output: ''", "output is '': give a name"),
        ("output: ???", "output is ???: give it a value"),
        ("loss:", "loss is empty: it is a section"),
        ("optim: 3", "optim is 3: it is a section"),
        ("optim: {steps: }", "optim.steps is null: give steps, or optim.epochs"),
        ("optim: {steps: many}", "optim.steps is 'many': give a whole number"),
        ("optim: {steps: 0}", "optim.steps is 0: must be at least 1"),
        ("optim: {lr_lora: .nan}", "optim.lr_lora is nan: give finite numbers"),
        ("optim: {betas: 0.9}", "optim.betas is 0.9: give a list of numbers"),
        ("optim: {betas: [0.9]}", "optim.betas is [0.9]: give 2 numbers"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas is [0.9, 1.0]: must be at least 0 and below 1"),
        (
            "data: {train: [{shards:/x}]}",
            "data.train[0]: 'shards:/x': write a blank after the colon: {shards: /x}",
        ),
        ("data: {train: [{shard: x}]}", "data.train[0]: unknown key 'shard'; did you mean 'shards'?"),
        (
            "data: {valid: [{shards: x, weight: heavy}]}",
            "data.valid[0]: weight is 'heavy': give a number, or null",
        ),
        ("data: {train: {shards: x}}", "data.train is a list: write data.train=[{shards: DIR}]"),
        ("data: {train: [{}]}", "data.train[0].shards is '': give a name"),
        ("data: {noise_snr_db: [3]}", "data.noise_snr_db is [3.0]: give 0 or 2 numbers"),
        ("data: {noise_snr_db: [30, 10]}", "data.noise_snr_db is [30.0, 10.0]: give [lowest, highest]"),
        ("data: {min_seconds: 40}", "data.min_seconds is 40, above data.max_seconds=30"),
        ("data: {mixture: {task_weights: {1: 2}}}", "is named by 1, which is no text"),
        ("model: {llm: {lora_targets: []}}", "model.llm.lora_targets is []: give a list of names"),
        ("model: {llm: {lora_targets: '('}}", "model.llm.lora_targets is '(': no regular expression"),
        (
            "model: {alignment: {ctc_length: true}}",
            "model.alignment.ctc_length is 'True': give true or full (in quotes",
        ),
        ("model: {alignment: {ctc_length: full}}", "model.encoder.pad_to_seconds pads nothing"),
        ("init_accept: [model.shrinking.keeps]", "did you mean 'model.shrinking.keep'?"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.delenv("NOT_SET", raising=False)
    assert words in error_of(write(tmp_path, content))


def test_the_file_that_sets_the_wrong_value_is_named(tmp_path):
    first = write(tmp_path, "optim: {betas: [1]}", "first.yaml")
    second = write(tmp_path, "base: first.yaml\noptim: {steps: 3}", "second.yaml")
    assert error_of(second).startswith(f"{first}: optim.betas is ")
    assert error_of(second, ["optim.betas=[1,2,3]"]).startswith("command line: optim.betas is ")


def test_a_cycle_of_bases_is_named_whatever_its_length(tmp_path):
    write(tmp_path, "base: two.yaml", "one.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base: sub/three.yaml", "two.yaml")
    write(tmp_path / "sub", "base: ../one.yaml", "three.yaml")
    assert "one.yaml -> " in error_of(tmp_path / "one.yaml") and "three.yaml" in error_of(
        tmp_path / "one.yaml"
    )


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe\x00"), lambda path: None]
)
def test_what_is_no_readable_file_is_one_line(tmp_path, make):
    make(tmp_path / "r.yaml")
    assert str(tmp_path / "r.yaml") in error_of(tmp_path / "r.yaml")


# ------------------------------------------------------------------------------------------------------------


def test_home_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "home").mkdir()
    write(
        tmp_path / "home",
        "output: ~/out\nmodel: {llm: {name: $SCRATCH/llm}, encoder: {name: ~/whisper}}",
        "base.yaml",
    )
    recipe = load_recipe(
        write(tmp_path, "base: ~/base.yaml"),
        [
            "data.train=[{shards: ~/a}, {shards: 'pipe:cat ~/b.tar'}, {shards: 's3://~/c'}]",
            "data.valid=[{shards: '${oc.env:SCRATCH}/v'}]",
            "data.cache_features=~/cache",
            "checkpoint.copy_to=~/copies",
            "init_from=~/model",
            "deepspeed=~/ds.json",
        ],
    )
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    assert [
        recipe.output,
        recipe.model.encoder.name,
        recipe.data.cache_features,
        recipe.checkpoint.copy_to,
        recipe.init_from,
        recipe.deepspeed,
    ] == [str(home / name) for name in ("out", "whisper", "cache", "copies", "model", "ds.json")]
    assert recipe.model.llm.name == str(scratch / "llm") and recipe.data.valid[0].shards == str(scratch / "v")
    assert [corpus.shards for corpus in recipe.data.train] == [
        str(home / "a"),
        "pipe:cat ~/b.tar",
        "s3://~/c",
    ]
    # Every key that names a file is marked as one: a new one must be, too.
    marked = {
        name
        for name in known_keys()
        if name.rpartition(".")[2]
        in ("output", "init_from", "deepspeed", "name", "copy_to", "cache_features")
    }
    assert len(marked) == 7


# --------------------------------------------------------------------------------------------- a model folder


def model_folder(folder: Path, stage: str, config: SoundwaveConfig, lora: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "soundwave.json").write_text(
        json.dumps({"config": dataclasses.asdict(config), "stage": stage, "frozen": {}})
    )
    if lora:
        (folder / "lora").mkdir()
    return folder


def test_a_stage_inherits_the_options_of_the_official_checkpoint(tmp_path):
    """All options of the official checkpoint, and the frozen parts' places; the machine's choices and LoRA stay
    the recipe's."""
    config = official_switches(SoundwaveConfig())
    config.llm.name, config.llm.lora_r, config.dtype = "llm", 0, "float16"
    start = model_folder(tmp_path / "official", "sft", config)
    (start / "llm").mkdir()
    recipe = load_recipe(write(tmp_path, f"stage: shrinking\ninit_from: {start}\nmodel: {{dtype: bfloat16}}"))
    expected = official_switches(SoundwaveConfig())
    expected.llm.name, expected.dtype = str(start / "llm"), "bfloat16"
    assert recipe.model == expected and recipe.model.llm.lora_r == 64


def test_a_contradiction_names_key_both_values_and_file(tmp_path):
    start = model_folder(tmp_path / "official", "sft", official_switches(SoundwaveConfig()))
    base = write(tmp_path, "model: {shrinking: {keep: peak}, prompt: chat}", "base.yaml")
    recipe = write(tmp_path, f"base: base.yaml\nstage: sft\ninit_from: {start}")
    line = error_of(recipe, ["model.alignment.attention=time"])
    for part in (
        "model.shrinking.keep: 'first' in the folder, 'peak' in " + str(base),
        "model.prompt: 'release' in the folder",
        "model.alignment.attention: 'frame' in the folder, 'time' in command line",
        str(start),
    ):
        assert part in line
    accepted = ["init_accept=[model.shrinking.keep,model.prompt]"]
    made = load_recipe(recipe, accepted)
    assert (made.model.shrinking.keep, made.model.prompt, made.model.shrinking.lookback) == (
        "peak",
        "chat",
        "kept",
    )
    assert "model.prompt" in error_of(recipe, ["init_accept=[model.shrinking.keep]"])
    # What is written out and equal contradicts nothing.
    assert (
        load_recipe(recipe, ["model.shrinking.keep=first", "model.prompt=release"]).model.shrinking.keep
        == "first"
    )


@pytest.mark.parametrize(
    "override",
    [
        "model.alignment.dropout=0.3",
        "model.shrinking.dropout=0.3",
        "model.llm.lora_dropout=0.1",
        "model.dtype=bfloat16",
        "model.attention_implementation=eager",
        "model.ops.skip_below=0",
        "model.encoder.max_seconds=10",
        "model.llm.name=elsewhere",
        "model.encoder.name=elsewhere",
    ],
)
def test_what_is_not_the_models_meaning_may_differ(tmp_path, override):
    start = model_folder(tmp_path / "start", "sft", SoundwaveConfig(), lora=True)
    load_recipe(write(tmp_path, f"stage: sft\ninit_from: {start}"), [override])


@pytest.mark.parametrize("override", ["model.llm.lora_alpha=8", "model.llm.lora_r=8"])
def test_lora_is_inherited_where_the_folder_has_it(tmp_path, override):
    config = SoundwaveConfig()
    config.llm.lora_r, config.llm.lora_alpha, config.llm.lora_targets = 4, 32, ["v_proj"]
    start = model_folder(tmp_path / "start", "shrinking", config, lora=True)
    recipe = write(tmp_path, f"stage: sft\ninit_from: {start}")
    assert load_recipe(recipe).model.llm == config.llm
    assert f"{override.partition('=')[0]}: " in error_of(recipe, [override])
    without = write(tmp_path, f"stage: sft\ninit_from: {model_folder(tmp_path / 'merged', 'sft', config)}")
    assert load_recipe(without, [override]).model.llm.lora_targets is None


def test_a_stage_one_folder_decides_the_alignment_adapter_alone(tmp_path):
    config = SoundwaveConfig(prompt="release")
    config.alignment.stack_frames, config.shrinking.lookback, config.encoder.pad_to_seconds = 4, "kept", 30.0
    model_folder(tmp_path / "run" / "alignment" / "model", "alignment", config)
    recipe = write(tmp_path, f"stage: shrinking\noutput: {tmp_path / 'run'}")
    made = load_recipe(recipe, ["model.shrinking.lookback=none"]).model
    assert (made.alignment.stack_frames, made.encoder.pad_to_seconds) == (4, 30.0)
    assert (made.shrinking.lookback, made.prompt) == ("none", "chat")
    line = error_of(recipe, ["model.alignment.stack_frames=5"])
    assert "model.alignment.stack_frames: 4 in the folder, 5 in command line" in line
    assert load_recipe(recipe, ["init_from=fresh"]).model.alignment.stack_frames == 2, (
        "fresh inherits nothing"
    )


def test_a_folder_without_a_later_option_has_its_default(tmp_path):
    start = model_folder(tmp_path / "start", "sft", SoundwaveConfig())
    description = json.loads((start / "soundwave.json").read_text())
    del description["config"]["shrinking"]["token_embeddings"]
    (start / "soundwave.json").write_text(json.dumps(description))
    recipe = write(tmp_path, f"stage: sft\ninit_from: {start}")
    assert load_recipe(recipe).model.shrinking.token_embeddings is False
    assert "token_embeddings: false in the folder" in error_of(
        recipe, ["model.shrinking.token_embeddings=true"]
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"config": 3, "stage": "sft"}',
        '{"stage": "sft"}',
        '{"config": {"alignment": {"layers": "many"}}, "stage": "sft"}',
        '{"config": {"alignment": {"layers": -1}}, "stage": "sft"}',
        '{"config": {"prompt": null}, "stage": "sft"}',
    ],
)
def test_a_start_folder_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "soundwave.json").write_text(content)
    error_of(write(tmp_path, f"stage: sft\ninit_from: {tmp_path / 'start'}"))


# ---------------------------------------------------------------------------------------------------------- t


def test_rules_of_a_field_are_checked_where_it_is_declared():
    @dataclasses.dataclass
    class Inner:
        keep: str = choice("a", "a", "b")
        share: float | None = number(None, above=0, most=1)

    @dataclasses.dataclass
    class Outer:
        inner: Inner = dataclasses.field(default_factory=Inner)
        many: list[Inner] = dataclasses.field(default_factory=list)
        pair: list[float] = numbers(counts=(0, 2), least=0)
        where: str = location("x")
        word: str = text("x")
        names: object = names_or_pattern()

    assert not list(problems(Outer())) and not list(
        problems(Outer(Inner("b", 1.0), [Inner()], [1, 2], "pipe:a b", "y", ["q"]))
    )
    wrong = Outer(Inner("c", 0.0), [Inner(), Inner("d")], [1], "", " ", [3])
    assert [key for key, _ in problems(wrong)] == [
        "inner.keep",
        "inner.share",
        "many[1].keep",
        "pair",
        "where",
        "word",
        "names",
    ]
    assert dict(problems(wrong))["inner.share"] == "is 0.0: must be above 0 and at most 1"


def test_the_window_of_the_health_check_is_as_long_as_it_needs():
    window = next(field for field in dataclasses.fields(HealthConfig) if field.name == "window")
    assert window.metadata["least"] == Health.MINIMUM


def test_more_workers_than_cores_are_a_warning():
    recipe = Recipe()
    recipe.data.workers = 4
    assert workers_warning(recipe, 4) == []
    assert workers_warning(recipe, 2) == ["data.workers=4, but a rank has 2 cores here: give data.workers=1"]
    assert "1 core here: give data.workers=1" in workers_warning(recipe, 1)[0]


def test_a_warm_up_that_never_ends_is_a_warning():
    recipe = Recipe()
    recipe.optim.steps, recipe.optim.warmup_steps = 300, 400
    (line,) = warnings_of(recipe)
    assert "optim.warmup_steps=400 is not below optim.steps=300" in line and "75%" in line
    recipe.optim.warmup_steps = 299
    assert warnings_of(recipe) == []
    recipe.optim.steps, recipe.optim.warmup_steps = 1, 0
    assert warnings_of(recipe) == []
