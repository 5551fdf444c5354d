"""A stage that is done, or begun, and a recipe that asks for something else: what is compared, what may
differ, the ways out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from model.soundwave import Soundwave
from recipe.config import Recipe, RecipeError, load_recipe
from recipe.stages import initial_folder
from tests.model import tiny as tiny_models
from tests.train.tiny import STAGES, workspace
from train import preflight, setup
from train import run as entry
from train.checkpoint import compatibility
from train.checkpoint.verification import sha256_of

QUICK = ["data.valid=[]", "log.tensorboard=false", "optim.steps=4", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory) -> Path:
    """A workspace whose three stages are done. Only stage 1 sets how many frames are stacked."""
    root = workspace(tmp_path_factory.mktemp("finished"))
    first = yaml.safe_load((root / "stage1.yaml").read_text())
    first["model"]["alignment"] = {"stack_frames": 4}
    (root / "stage1.yaml").write_text(yaml.safe_dump(first))
    for number in STAGES:
        run = server.start([root / f"stage{number}.yaml", *QUICK], ranks=1)
        assert run.wait() == [0], run.text()
        (root / f"stage{number}.log").write_text(run.text())
    return root


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """A copy of it; the recipes name the original's models and data."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def recipe(trained: Path, place: Path, number: int, *overrides: str) -> Recipe:
    return load_recipe(trained / f"stage{number}.yaml", [*QUICK, f"output={place}", *overrides])


def error_of(*args) -> str:
    with pytest.raises(RecipeError) as raised:
        compatibility.finished(recipe(*args))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------- t


@pytest.mark.parametrize("number", STAGES)
def test_the_same_recipe_is_finished(trained, place, number):
    assert compatibility.finished(recipe(trained, place, number))
    (place / STAGES[number] / "run.json").write_text("{}")
    assert not compatibility.finished(recipe(trained, place, number)), "ended otherwise"
    shutil.rmtree(place / STAGES[number])
    assert not compatibility.finished(recipe(trained, place, number))


@pytest.mark.parametrize(
    "number, overrides",
    [
        (
            2,
            [
                "log.every_steps=7",
                "checkpoint.keep_last=9",
                "checkpoint.best_by=loss",
                "data.workers=0",
                "data.prefetch=1",
            ],
        ),
        (
            2,
            [
                "data.micro_batch_seconds=5",
                "deepspeed=ds_configs/zero2.json",
                "optim.activation_checkpointing=true",
            ],
        ),
        (2, ["health.desync_every_steps=1", "data.max_rejected_share=0.5", "data.try_largest=true"]),
        (2, ["model.llm.lora_targets=[o_proj,q_proj,v_proj,k_proj]"]),  # the default, written out
        (
            1,
            [
                "model.llm.lora_r=16",
                "model.llm.lora_alpha=1",
                "model.prompt=release",
                "optim.lr_lora=1",
                "loss.ctc_weight=1",
            ],
        ),
        (1, ["model.shrinking.keep=first", "data.micro_batch_tokens=99", "model.llm.lora_targets=[nothing]"]),
        (
            3,
            [
                "optim.lr_adapters=1",
                "optim.lr_ctc_head=1",
                "model.alignment.dropout=0.5",
                "loss.ctc_weight=0",
            ],
        ),
    ],
)
def test_what_changes_nothing_of_the_stage_may_differ(trained, place, number, overrides):
    assert compatibility.finished(recipe(trained, place, number, *overrides))


def test_data_models_and_output_may_move(trained, place, tmp_path):
    for name in ("train", "whisper", "llm"):
        shutil.copytree(trained / name, tmp_path / "moved" / name)
    moved = tmp_path / "moved"
    assert compatibility.finished(
        recipe(
            trained,
            place,
            2,
            f"data.train=[{{shards: {moved / 'train'}}}]",
            f"model.encoder.name={moved / 'whisper'}",
            f"model.llm.name={moved / 'llm'}",
        )
    )


def test_what_is_gone_is_not_compared(trained, place):
    """Data and base of a finished stage may be deleted, and so may the stage before it."""
    for stage in ("alignment", "shrinking"):
        edit(
            place / stage / "model" / "soundwave.json",
            lambda d: (
                d["recipe"]["data"]["train"][0].update(shards="gone/data"),
                d["recipe"]["model"]["llm"].update(name="gone/llm"),
            ),
        )
    gone = ["data.train=[{shards: gone/data}]", "model.llm.name=gone/llm"]
    assert compatibility.finished(recipe(trained, place, 1, *gone))
    shutil.rmtree(place / "alignment")
    assert compatibility.finished(recipe(trained, place, 2, *gone))
    assert "data.mixture.tau_end: 1.0 -> 3.0" in error_of(trained, place, 2, *gone, "data.mixture.tau_end=3")


# ------------------------------------------------------------------------------------------------------- anot


@pytest.mark.parametrize(
    "number, override, words",
    [
        (1, "optim.lr_adapters=0.5", "optim.lr_adapters: 0.001 -> 0.5"),
        (1, "seed=7", "seed: 1 -> 7"),
        (1, "data.seed=7", "data.seed: 0 -> 7"),
        (1, "data.batch_seconds=9", "data.batch_seconds: 6.0 -> 9.0"),
        (1, "model.alignment.dropout=0", "model.alignment.dropout: 0.1 -> 0.0"),
        (1, "data.spec_augment=true", "data.spec_augment: False -> True"),
        (2, "optim.lr_lora=0.5", "optim.lr_lora: 0.0002 -> 0.5"),
        (2, "loss.ctc_weight=0", "loss.ctc_weight: 0.3 -> 0.0"),
        (2, "model.llm.lora_alpha=3", "model.llm.lora_alpha: 16 -> 3"),
        (2, "model.llm.lora_targets=[q_proj]", "model.llm.lora_targets: "),
        (2, "model.shrinking.keep=first", "model.shrinking.keep: peak -> first"),
        (
            2,
            "data.mixture.task_weights={asr: 0.5, translation: 0.3, text: 0.2}",
            "data.mixture.task_weights.asr: None -> 0.5",
        ),
        (3, "optim.weight_decay=0.5", "optim.weight_decay: 0.01 -> 0.5"),
        (3, "model.llm.lora_dropout=0.5", "model.llm.lora_dropout: 0.0 -> 0.5"),
    ],
)
def test_another_recipe_is_named_with_the_ways_out(trained, place, number, override, words):
    line = error_of(trained, place, number, override)
    folder = place / STAGES[number]
    assert line.startswith(f"{folder / 'model'} was made with another recipe ({words}"), line
    for way in (
        "give the old one back",
        "choose another output",
        f"remove {folder} to train the stage again",
        "keep the model as it is, or accept it with checkpoint.accept_changes=[recipe]",
    ):
        assert way in line
    assert compatibility.finished(
        recipe(trained, place, number, override, "checkpoint.accept_changes=[recipe]")
    )


def test_a_retrained_earlier_stage_is_noticed(trained, place):
    path = place / "alignment" / "model" / "adapters.safetensors"
    tensors = load_file(path)
    tensors["alignment.norm.bias"] += 1
    save_file(tensors, path)
    line = error_of(trained, place, 2)
    assert "another base (weights of the model folder that the stage starts from: sha256 " in line
    assert "checkpoint.accept_changes=[base]" in line
    assert compatibility.finished(recipe(trained, place, 2, "checkpoint.accept_changes=[base]"))
    assert compatibility.finished(recipe(trained, place, 1)) and compatibility.finished(
        recipe(trained, place, 3)
    ), "they did not start from it"


def test_another_start_is_noticed(trained, place, tmp_path):
    fresh = ["init_from=fresh", "model.alignment.stack_frames=4"]
    assert "weights of the model folder that the stage starts from: sha256 " in error_of(
        trained, place, 2, *fresh
    )
    same = shutil.copytree(place / "alignment" / "model", tmp_path / "elsewhere")
    assert compatibility.finished(recipe(trained, place, 2, f"init_from={same}"))
    assert "starts from" in error_of(trained, place, 2, f"init_from={place / 'shrinking' / 'model'}")


def test_other_data_is_noticed(trained, place):
    assert "another index (index: sha256 " in error_of(
        trained, place, 1, f"data.train=[{{shards: {trained / 'valid'}}}]"
    )
    assert "no index.json in 'nowhere'" in error_of(trained, place, 1, "data.train=[{shards: nowhere}]")


def test_another_base_is_noticed(trained, place, tmp_path):
    torch.manual_seed(9)
    other = tiny_models.llm(tmp_path / "other")
    assert "another base (llm: sha256 " in error_of(trained, place, 2, f"model.llm.name={other}")
    for file, change, words in (
        ("config.json", lambda c: c.update(rms_norm_eps=0.5), "another base (llm: config.json rms_norm"),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<|im_start|>"), "another tokenizer ("),
    ):
        changed = Path(shutil.copytree(trained / "llm", tmp_path / file))
        edit(changed / file, change)
        assert words in error_of(trained, place, 2, f"model.llm.name={changed}")


# ------------------------------------------------------------------------------------------------------------


def test_fewer_steps_are_an_error_and_more_continue_where_that_is_meant(trained, place):
    for accepted in ([], ["checkpoint.accept_changes=[recipe]"]):
        line = error_of(trained, place, 2, "optim.steps=3", *accepted)
        assert (
            f"optim.steps is 3, and {place / 'shrinking' / 'model'} is at step 4 already: give at least 4"
            in line
        )
    line = error_of(trained, place, 2, "optim.steps=6")
    assert (
        "(optim.steps: 4 -> 6)" in line and "to continue from its last checkpoint, or accept it with" in line
    )
    more = ["optim.steps=6", "checkpoint.accept_changes=[recipe]"]
    assert not compatibility.finished(recipe(trained, place, 2, *more))
    shutil.rmtree(place / "shrinking" / "checkpoints")
    assert "no checkpoint is left to continue from; choose another output with init_from=" in error_of(
        trained, place, 2, *more
    )


def test_a_stage_that_was_begun_is_compared_with_its_newest_checkpoint(trained, place):
    shutil.rmtree(place / "shrinking" / "model")
    compatibility.check_checkpoint(recipe(trained, place, 2))
    for override, words in (
        ("optim.lr_lora=0.5", "step-000004 was made with another recipe (optim.lr_lora: 0.0002 -> 0.5)"),
        ("optim.steps=3", "step-000004 is at step 4 already"),
    ):
        with pytest.raises(RecipeError) as raised:
            compatibility.check_checkpoint(recipe(trained, place, 2, override))
        assert words in str(raised.value)
    with pytest.raises(RecipeError, match="step 4 already"):
        compatibility.check_checkpoint(
            recipe(trained, place, 2, "optim.steps=3", "checkpoint.accept_changes=[recipe]")
        )
    compatibility.check_checkpoint(
        recipe(trained, place, 2, "optim.steps=9", "checkpoint.accept_changes=[recipe]")
    )


def test_folders_of_an_earlier_version_are_compared_by_what_they_hold(trained, place):
    """They recorded neither the start nor settings; LoRA's targets as the list that was the default."""

    def earlier(described: dict) -> None:
        del described["start"], described["settings"], described["recipe"]["init_accept"]
        described["recipe"]["model"]["llm"]["lora_targets"] = ["q_proj", "k_proj", "v_proj", "o_proj"]

    edit(place / "shrinking" / "model" / "soundwave.json", earlier)
    assert compatibility.finished(recipe(trained, place, 2))
    assert "optim.lr_lora" in error_of(trained, place, 2, "optim.lr_lora=3")
    fresh = ["init_from=fresh", "model.alignment.stack_frames=4"]
    assert "starts from" in error_of(trained, place, 2, *fresh), "which its checkpoints recorded"
    shutil.rmtree(place / "shrinking" / "checkpoints")
    assert compatibility.finished(recipe(trained, place, 2, *fresh)), "and nothing else does"


# -------------------------------------------------------------------------------------------- the start of st


def test_stage_three_needs_all_that_it_leaves_as_it_is(trained, place):
    with pytest.raises(
        RecipeError, match="stage 3 .sft. trains LoRA alone.* give the model folder of stage 2, not"
    ):
        initial_folder(recipe(trained, place, 3, "init_from=fresh"))
    with pytest.raises(
        RecipeError, match="holds no trained shrinking adapter: give the model folder of stage 2"
    ):
        initial_folder(recipe(trained, place, 3, f"init_from={place / 'alignment' / 'model'}"))
    assert initial_folder(recipe(trained, place, 3)) == place / "shrinking" / "model"
    assert initial_folder(recipe(trained, place, 2, "init_from=fresh")) is None, "stage 2 trains them itself"
    path = place / "shrinking" / "model" / "adapters.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith("alignment.")}, path
    )
    with pytest.raises(RecipeError, match="holds no trained alignment adapter"):
        initial_folder(recipe(trained, place, 3))


# ---------------------------------------------------------------------------------------- by the entries that


def dry_run(capsys, *arguments) -> tuple[int, str, str]:
    code = entry.main([*map(str, arguments), "--dry-run"])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_dry_run_says_the_same(trained, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.run.fill_environment", lambda: None)
    usual = [*QUICK, f"output={place}"]
    code, out, _ = dry_run(capsys, trained / "stage2.yaml", *usual)
    assert (
        code == 0 and f"stage 2 is finished: {place / 'shrinking' / 'model'}; nothing would be trained" in out
    )
    assert "LoRA on q_proj x 2, k_proj x 2, v_proj x 2, o_proj x 2" in out
    changed = Path(shutil.copytree(trained / "llm", tmp_path / "llm"))
    edit(changed / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3, "zero_optimization": {"stage": 2}}')
    new = f"output={tmp_path / 'new'}"
    start = f"init_from={place / 'alignment' / 'model'}"
    for number, arguments, words in (
        (2, ["seed=7"], "was made with another recipe (seed: 1 -> 7)"),
        (2, ["optim.steps=2"], "is at step 4 already"),
        (
            2,
            [new, start, "model.alignment.stack_frames=5"],
            "alignment.stack_frames: 4 in the folder, 5 in command line",
        ),
        (
            2,
            [new, start, f"model.llm.name={changed}"],
            "trained with another llm (config.json rms_norm_eps: 1e-06 -> 0.5)",
        ),
        (
            2,
            [new, start, "model.llm.lora_targets=[q_proj,kproj]"],
            "has no linear layer 'kproj'; did you mean 'k_proj'?",
        ),
        (
            2,
            [new, start, f"deepspeed={tmp_path / 'ds.json'}"],
            "gradient_clipping is 3, but optim.grad_clip is 1",
        ),
        (3, [new, start], "holds no trained shrinking adapter"),
        (3, [new, "init_from=fresh"], "not `fresh`"),
        (
            3,
            [new, f"init_from={place / 'shrinking' / 'model'}", "model.llm.lora_targets=[q_proj]"],
            "its LoRA does not fit",
        ),
        (3, ["model.llm.lora_r=0"], "model.llm.lora_r: 4 in the folder, 0 in command line"),
        (
            3,
            [new, f"init_from={place / 'alignment' / 'model'}", "model.llm.lora_r=0"],
            "nothing would be trained",
        ),
    ):
        code, _, err = dry_run(capsys, trained / f"stage{number}.yaml", *usual, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1, (arguments, err)
    code, out, _ = dry_run(capsys, trained / "stage2.yaml", *usual, new, start, "optim.warmup_steps=9")
    assert code == 0 and f"starts from {place / 'alignment' / 'model'}" in out
    assert "warning: optim.warmup_steps=9 is not below" in out
    assert "give fewer, e.g. optim.warmup_steps=" in out and "warning: data.ctc_text" not in out
    code, out, _ = dry_run(capsys, trained / "stage2.yaml", *usual, new, start, "data.ctc_text=raw")
    assert (
        code == 0 and f"data.ctc_text=raw, but {place / 'alignment' / 'model'} was trained with lower" in out
    )
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "split" / "train" / "index.json").write_text("{}")
    packed = f"data.train=[{{shards: {tmp_path / 'split'}}}, {{shards: {tmp_path / 'none'}}}]"
    absent = f"init_from={tmp_path / 'official'}"
    code, out, _ = dry_run(capsys, trained / "stage2.yaml", *usual, new, packed, absent)
    for line in (
        f"data.train: {tmp_path / 'split'} has no index.json; give one of its packed folders: train",
        f"data.train: {tmp_path / 'none'} does not exist; pack it",
        f"starts from {tmp_path / 'official'}, which holds no finished model: give a model folder",
    ):
        assert code == 0 and line in out, out
    code, out, _ = dry_run(capsys, trained / "stage2.yaml", *usual, new)
    assert code == 0 and "missing:\n  - stage 2 (shrinking) starts from " in out, (
        "a stage that is yet to come is no fault"
    )


def test_the_chain_asks_the_same_question(trained, place, capsys):
    def where(number: int, *overrides: str) -> tuple[int, list[str], str]:
        code = preflight.main(
            [str(trained / f"stage{number}.yaml"), *QUICK, f"output={place}", "--where", *overrides]
        )
        out = capsys.readouterr()
        return (
            code,
            [line.removeprefix("soundwave-where ").partition(" ")[2] for line in out.out.splitlines()],
            out.err,
        )

    assert where(2) == (0, ["shrinking", str(place), "finished", str(place / "alignment" / "model")], "")
    assert where(1)[1] == ["alignment", str(place), "finished", ""]
    code, out, err = where(2, "seed=7")
    assert code == 2 and not out and err.startswith("error: ") and "(seed: 1 -> 7)" in err
    shutil.rmtree(place / "shrinking" / "model")
    assert where(2)[1][2] == "unfinished"
    assert where(2, "seed=7")[0] == 2, "its checkpoint belongs to another recipe"


def test_training_refuses_keeps_and_continues(server, trained, place):
    """Exit code 2 and run.json as it was; then more steps, from the last checkpoint on."""
    command = [trained / "stage2.yaml", *QUICK, f"output={place}"]
    noted = (place / "shrinking" / "run.json").read_text()
    run = server.start([*command, "optim.lr_lora=0.5"], ranks=1)
    assert run.wait() == [2] and "was made with another recipe (optim.lr_lora: 0.0002 -> 0.5)" in run.text()
    assert (place / "shrinking" / "run.json").read_text() == noted
    run = server.start([*command, "optim.steps=6", "checkpoint.accept_changes=[recipe]"], ranks=1)
    assert run.wait() == [0] and "resuming at step 4" in run.text(), run.text()
    described = json.loads((place / "shrinking" / "model" / "soundwave.json").read_text())
    assert (described["step"], described["recipe"]["optim"]["steps"]) == (6, 6)
    assert compatibility.finished(recipe(trained, place, 2, "optim.steps=6"))


def test_a_changed_base_stops_a_resumed_run_unless_accepted(server, trained, place, tmp_path):
    """The chat template and the norm's epsilon; a checkpoint of an earlier version is resumed, with one
    line."""
    changed = Path(shutil.copytree(trained / "llm", tmp_path / "llm"))
    edit(changed / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    shutil.rmtree(place / "shrinking" / "model")
    shutil.rmtree(place / "shrinking" / "checkpoints" / "step-000004")
    with pytest.raises(
        RecipeError,
        match=r"step-000002 was made with another base \(llm: config.json rms_norm_eps: 1e-06 -> 0",
    ):
        compatibility.check_checkpoint(recipe(trained, place, 2, f"model.llm.name={changed}"))
    command = [trained / "stage2.yaml", *QUICK, f"output={place}", f"model.llm.name={changed}"]
    run = server.start([*command, "checkpoint.accept_changes=[base]"], ranks=1)
    assert run.wait() == [2] and "was made with another tokenizer (tokenizer: chat template: " in run.text()

    checkpoint = place / "shrinking" / "checkpoints" / "step-000002"
    edit(checkpoint / "state.json", lambda state: state["facts"].pop("settings"))
    state = checkpoint / "state.json"
    fact = {"size": state.stat().st_size, "sha256": sha256_of(state)}
    edit(checkpoint / "manifest.json", lambda manifest: manifest["files"].update({"state.json": fact}))
    edit(place / "alignment" / "model" / "soundwave.json", lambda described: described.pop("settings"))
    run = server.start(command, ranks=1)
    assert run.wait() == [0], run.text()
    assert "resuming at step 2" in run.text()
    assert (
        run.text().count(
            "step-000002 does not record the configurations, the chat template and the end tokens"
        )
        == 1
    )


def test_the_next_stage_refuses_a_changed_base_unless_accepted(trained, place, tmp_path):
    changed = Path(shutil.copytree(trained / "llm", tmp_path / "llm"))
    edit(changed / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    changed_recipe = recipe(trained, place, 2, f"model.llm.name={changed}")
    model = Soundwave.build(changed_recipe.model)
    with pytest.raises(RecipeError) as raised:
        setup.check_base(changed_recipe, model, place / "alignment" / "model")
    assert "was trained with another llm (config.json rms_norm_eps: 1e-06 -> 0.5)" in str(raised.value)
    assert str(raised.value).endswith("or accept it with checkpoint.accept_changes=[base]")
    changed_recipe.checkpoint.accept_changes = ["tokenizer"]
    with pytest.raises(RecipeError, match=r"accept_changes=\[tokenizer,base\]"):
        setup.check_base(changed_recipe, model, place / "alignment" / "model")
    changed_recipe.checkpoint.accept_changes = ["base"]
    (note,) = setup.check_base(changed_recipe, model, place / "alignment" / "model")
    assert note.startswith("base has changed and is accepted: ")


def test_the_options_of_the_start_are_logged_used_and_recorded(trained, place):
    assert "model.alignment.stack_frames=4" in (trained / "stage2.log").read_text()
    for stage in STAGES.values():
        described = json.loads((place / stage / "model" / "soundwave.json").read_text())
        assert (
            described["config"]["alignment"]["stack_frames"] == 4
            and described["recipe"]["model"] == described["config"]
        )
        expected = None if stage == "alignment" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert described["config"]["llm"]["lora_targets"] == expected, "recorded as what it is"
