"""The demo does each step once, resumes where it stopped, and ends with a table of what was scored."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import steps
from examples.quickstart import demo, results
from recipe.config import load_recipe

ROOT = Path(__file__).resolve().parents[3]


class FewSteps:
    """A plan of ordinary commands that leave a trace of each run."""

    def __init__(self, folder: Path) -> None:
        self.output, self.keys, self.fail = folder, {"a": 1, "b": 1}, set()

    def run(self) -> None:
        steps.run(self.output / "record.json", self.steps())

    def steps(self) -> list[steps.Step]:
        planned = []
        for name in ("a", "b"):
            made = self.output / name / "made"
            code = (
                f"import pathlib, sys; made = pathlib.Path({str(made)!r}); made.parent.mkdir(exist_ok=True); "
                f"made.write_text((made.read_text() if made.exists() else '') + 'x'); "
                f"sys.exit({int(name in self.fail)})"
            )
            planned.append(
                steps.Step(
                    name,
                    f"step {name}",
                    0.01,
                    [sys.executable, "-c", code],
                    lambda name=name: self.keys[name],
                    made,
                    set_aside=made.parent,
                )
            )
        return planned

    def runs(self, name: str) -> int:
        return len((self.output / name / "made").read_text())


def test_a_step_that_is_done_is_not_done_again(tmp_path):
    plan = FewSteps(tmp_path)
    plan.run()
    plan.run()
    assert (plan.runs("a"), plan.runs("b")) == (1, 1)


def test_the_launchers_lines_are_in_the_log_and_not_on_the_console(tmp_path, capsys):
    noise = (
        "[2026-11-29 19:53:11,796] [INFO] [launch.py:152:main] WORLD INFO DICT: {'localhost': [0, 1]}",
        "[2026-11-29 19:52:32,570] [WARNING] [runner.py:214:fetch_hostfile] Unable to find hostfile",
    )
    own = "2026-11-29 19:53:20 INFO step 1: loss 2.0"
    step = waiting_for(tmp_path, "a", "print(" + repr("\n".join([*noise, own])) + ")", after=())
    steps.run(tmp_path / "record.json", [step])
    console, log = capsys.readouterr().out, (tmp_path / "logs/a.log").read_text()
    assert own in console.splitlines() and own in log
    assert all(line in log and line not in console.splitlines() for line in noise)


def test_a_changed_step_begins_afresh_and_the_former_result_is_kept(tmp_path):
    plan = FewSteps(tmp_path)
    plan.run()
    plan.keys["b"] = 2
    plan.run()
    assert (plan.runs("a"), plan.runs("b")) == (1, 1)
    assert (tmp_path / "former-1/b/made").read_text() == "x"


def test_a_failed_step_stops_and_resumes_in_the_same_folder(tmp_path):
    plan = FewSteps(tmp_path)
    plan.fail = {"a"}
    with pytest.raises(steps.StepError, match="step a, failed .exit 1.*same command resumes"):
        plan.run()
    assert not (tmp_path / "b").exists()
    plan.fail = set()
    plan.run()
    assert (plan.runs("a"), plan.runs("b")) == (2, 1)  # not set aside: it is the same run
    assert not list(tmp_path.glob("former-*"))


@pytest.mark.parametrize(
    ("name", "stages"), [("demo", ["alignment", "shrinking", "sft"]), ("quick", ["alignment"])]
)
def test_the_recipes_and_the_plan_fit_together(name, stages):
    plan = demo.Plan(ROOT / f"examples/quickstart/{name}.yaml", ranks=2)
    assert [recipe.stage for _, recipe in plan.recipes] == stages
    assert len({recipe.output for _, recipe in plan.recipes}) == 1
    planned = plan.steps()
    assert len({step.name for step in planned}) == len(planned)
    packed = {step.name.removeprefix("pack-") for step in planned if step.name.startswith("pack-")}
    assert packed <= set(demo.MANIFESTS) and plan.settings.picture.shards in packed
    for stage, recipe in plan.recipes:
        corpora = [*recipe.data.train, *recipe.data.valid]
        assert {Path(corpus.shards).name for corpus in corpora} | {
            *(name for when in demo.WHEN if when in stage for name in stage[when].shards),
        } <= packed
        assert not any("test" in corpus.shards for corpus in corpora), (
            "tuning and training never see a test split"
        )
        assert not any("valid" in corpus.shards for corpus in recipe.data.train)
        assert recipe.deepspeed == "ds_configs/zero3.json"
    trained = [step for step in planned if step.name.startswith("train-")]
    assert all(
        "--num_gpus 2" in " ".join(step.command) and "deepspeed" in step.command[0] for step in trained
    )


def test_the_quick_plan_transcribes_what_it_has_trained():
    plan = demo.Plan(ROOT / "examples/quickstart/quick.yaml", ranks=2)
    commands = {step.name: step.command for step in plan.steps()}
    names = list(commands)
    assert names[-4:] == ["score-alignment-after", "clip", "transcribe", "picture"]
    assert str(plan.first_model) in commands["transcribe"] and str(plan.first_model) in commands["picture"]
    assert commands["clip"][-1] in commands["transcribe"], "the clip that was taken out is transcribed"
    assert commands["clip"][commands["clip"].index("--index") + 1] in commands["picture"], "and drawn"
    assert plan.output != demo.Plan(ROOT / "examples/quickstart/demo.yaml", ranks=2).output
    assert set(plan.transcribed()) <= {"CTC"}


def test_a_recipe_that_changes_what_is_learnt_changes_what_follows(monkeypatch):
    plan = demo.Plan(ROOT / "examples/quickstart/demo.yaml", ranks=2)

    def keys() -> dict[str, str]:
        plan.trained.clear()
        return {step.name: steps.digest(step.key()) for step in plan.steps()}

    before = keys()
    plan.recipes[1][1].optim.steps += 1
    plan.recipes[0][1].log.every_steps += 1
    after = keys()
    changed = {name for name in before if before[name] != after[name]}
    assert "train-shrinking" in changed and "train-sft" in changed and "picture" in changed
    assert any(name.startswith("score-shrinking-after") for name in changed)
    assert not any(name.startswith(("pack", "train-alignment", "score-alignment")) for name in changed)


def example_result() -> dict:
    def score(value, low, high):
        return {"value": value, "ci95": [low, high], "utterances": 200}

    recipes = {stage: {"seed": 0, "optim": {"steps": 7}} for stage in ("alignment", "sft")}
    return {
        "rows": [
            {
                "stage": "stage 1",
                "data": "dialogues-test",
                "task": "asr",
                "decode": "ctc",
                "measure": "WER",
                "before": score(1.0, 1.0, 1.0),
                "after": score(0.25, 0.22, 0.28),
            },
            {
                "stage": "stage 3",
                "data": "dialogues-test",
                "task": "asr",
                "decode": "greedy",
                "measure": "WER",
                "after": score(0.5, 0.4, 0.6),
            },
        ],
        "machine": {"processor": "a CPU", "cores": 2, "memory_gib": 8.0, "gpu": None},
        "versions": {"torch": "2", "deepspeed": "0"},
        "ranks": 2,
        "seconds": {"a": 60.0, "b": None},
        "commit": "abc",
        "changed_files": False,
        "date": "2026-01-01",
        "recipes": recipes,
    }


def test_scores_are_written_as_csv(tmp_path):
    results.write_csv(tmp_path / "quickstart.csv", example_result())
    comment, *lines = (tmp_path / "quickstart.csv").read_text().splitlines()
    assert "1 minutes in all" in comment and "alignment 7, sft 7" in comment
    first, last = csv.DictReader(lines)
    assert (first["before"], first["after"], first["after_low"]) == ("1.0000", "0.2500", "0.2200")
    assert (last["before"], last["after"], last["utterances"]) == ("", "0.5000", "200")


def test_the_table_shows_error_rates_in_percent_and_bleu_in_points():
    bleu = {"value": 31.24, "ci95": [30.0, 33.16], "utterances": 62}
    row = {"stage": "stage 2", "data": "b", "task": "translation", "decode": "generate", "measure": "BLEU"}
    example = example_result()
    example["rows"] += [row | {"before": bleu, "after": bleu}]  # generate: the former name of greedy
    first, *_, last = results.table(example).splitlines()[2:]
    assert "| WER, % " in first and "25.0 [22.0, " in first and " 100.0" in first
    assert "BLEU" in last and "31.2 [30.0, 33.2]" in last and "LLM, greedy" in last and "BLEU, %" not in last


def test_example_transcripts_are_utterances_that_all_systems_answered(tmp_path):
    def rows(name: str, ids: str, text: str) -> Path:
        path = tmp_path / f"{name}.jsonl"
        kept = [
            {"id": i, "corpus": "c", "task": "asr", "reference": f"said {i}", "prediction": text + i}
            for i in ids
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return path

    files = {"CTC": rows("a", "abcdefgh", "one\n"), "joint": rows("b", "hgfdb", "two ")}
    blocks = results.transcripts(files, count=2).split("\n\n")
    assert blocks[0].splitlines() == ["reference  said b", "CTC        one\\nb", "joint      two b"]
    assert len(blocks) == 2 and "said f" in blocks[1]
    assert results.transcripts(files, count=9).count("reference") == 5
    assert results.transcripts({**files, "LLM": tmp_path / "none.jsonl"}) == "" == results.transcripts({})


def test_small_recipes_load():
    for number in (1, 2, 3):
        recipe = load_recipe(ROOT / f"examples/quickstart/stage{number}.yaml", ["optim.steps=1"])
        assert recipe.optim.steps == 1 and recipe.model.llm.name.endswith("smollm2-135m")


def waiting_for(folder: Path, name: str, code: str, **options) -> steps.Step:
    """A step whose command runs `code` in `folder` and then leaves a file of its own name."""
    code = (
        f"import pathlib, sys, time; here = pathlib.Path({str(folder)!r}); {code}; (here / {name!r}).touch()"
    )
    return steps.Step(
        name, f"step {name}", 0.01, [sys.executable, "-c", code], lambda: name, folder / name, **options
    )


MEET = (
    "(here / '{own}-begun').touch(); end = time.monotonic() + 30\n"
    "while not (here / '{other}-begun').exists():\n    assert time.monotonic() < end; time.sleep(0.01)\n1"
)


def test_steps_run_side_by_side_where_they_do_not_need_each_other(tmp_path, capsys):
    """a and b wait for each other, so neither would end alone; c needs both, d none."""
    meet = {
        own: "exec(" + repr(MEET.format(own=own, other=other)) + ")"
        for own, other in (("a", "b"), ("b", "a"))
    }
    planned = [
        waiting_for(tmp_path, "a", meet["a"], after=()),
        waiting_for(tmp_path, "b", meet["b"], after=()),
        waiting_for(
            tmp_path, "c", "assert (here / 'a').exists() and (here / 'b').exists(); print('done ' + 'it')"
        ),
        waiting_for(tmp_path, "d", "1", after=("not in this list",)),
    ]
    steps.run(tmp_path / "record.json", planned, at_once=2)
    assert {step["status"] for step in steps.State(tmp_path / "record.json").steps.values()} == {"done"}
    assert (tmp_path / "logs/c.log").read_text() == "done it\n" and "done it" not in capsys.readouterr().out
    steps.run(tmp_path / "record.json", planned, at_once=2)
    assert capsys.readouterr().out.count(": done\n") == 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_failed_step_stops_only_what_needs_it(tmp_path, at_once):
    planned = [
        waiting_for(tmp_path, "a", "sys.exit(3)", after=()),
        waiting_for(tmp_path, "b", "1", after=()),
        waiting_for(tmp_path, "c", "1", after=("a",)),
        waiting_for(tmp_path, "d", "1", after=("b",)),
    ]
    with pytest.raises(steps.StepError, match="step 1, step a, failed .exit 3."):
        steps.run(tmp_path / "record.json", planned, at_once=at_once)
    assert [name for name in "abcd" if (tmp_path / name).exists()] == ["b", "d"]


SAVES_ON_TERM = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1]) / "a"
here.mkdir(exist_ok=True)
if (here / "part").exists():
    sys.exit((here / "made").touch())
signal.signal(signal.SIGTERM, lambda *_: sys.exit((here / "saved").touch()))
(here / "part").touch()
time.sleep(20)
"""
RUNS_IT = """
import pathlib, sys
from examples import steps
here = pathlib.Path(sys.argv[1])
command = [sys.executable, str(here / "saves_on_term.py"), str(here)]
steps.run(here / "record.json", [steps.Step("a", "step a", 0.01, command, lambda: 1, here / "a" / "made", set_aside=here / "a")])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_resumes_where_it_was(tmp_path, number):
    """Whatever ends it, what its step left is not taken for another run's; on SIGTERM the step gets the time
    to save."""
    (tmp_path / "saves_on_term.py").write_text(SAVES_ON_TERM)
    command = [sys.executable, "-c", RUNS_IT, str(tmp_path)]
    first, end = subprocess.Popen(command, cwd=ROOT), time.monotonic() + 60
    while not (tmp_path / "a" / "part").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(number)
    assert first.wait(30) != 0
    assert steps.State(tmp_path / "record.json").steps["a"]["status"] == "begun"
    assert (tmp_path / "a" / "saved").exists() == (number == signal.SIGTERM)
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "a" / "made").exists() and not list(tmp_path.glob("former-*"))


def test_what_measures_time_runs_alone(tmp_path):
    planned = [
        waiting_for(
            tmp_path,
            name,
            "assert not list(here.glob('busy-*')); (here / 'busy-m').touch(); time.sleep(0.3); "
            "(here / 'busy-m').unlink()"
            if name == "m"
            else f"assert not (here / 'busy-m').exists(); (here / 'busy-{name}').touch(); time.sleep(0.3); "
            f"(here / 'busy-{name}').unlink()",
            after=(),
            alone=name == "m",
        )
        for name in "ambc"
    ]
    steps.run(tmp_path / "record.json", planned, at_once=3)
    assert all((tmp_path / name).exists() for name in "abcm")


def test_a_port_is_chosen_when_a_step_begins():
    command = steps.training(2, "recipe.yaml", "seed=1")
    again = steps.with_free_port(command)
    assert [a for a, b in zip(command, again, strict=True) if a == b] == [
        a for a in command if not a.isdigit() or a == "2"
    ]
    assert steps.with_free_port(["python", "x"]) == ["python", "x"]
