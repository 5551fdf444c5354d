"""Model folders from strangers: whatever is in them, loading ends in a model or in one line, runs none of
their code and reads no file elsewhere."""

import ast
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.repository import PACKAGES, ROOT
from evaluation import answer
from model import artifact, inheritance
from model.convert import main as convert
from model.language_model import load_tokenizer
from model.pretrained import MOST_LAYERS, SourceError, fingerprint, locate, tensor_files
from tests.evaluation.conftest import sound
from tests.hostile import damaged_bytes, is_one_line, json_documents, only_inside, write_json

many = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def download(folders, parts, tmp_path):
    """A model folder with its frozen parts inside, and a file beside it that it must not reach."""
    target = tmp_path / "download"
    shutil.copytree(folders / "shrinking", target)
    for part in ("llm", "whisper"):
        shutil.copytree(parts / part, target / part)
    change(
        target / "soundwave.json",
        lambda d: (d["config"]["llm"].update(name="llm"), d["config"]["encoder"].update(name="whisper")),
    )
    return target


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    write_json(path, document)


def refused(target, **options):
    """The one line that loading ends in."""
    with pytest.raises(SourceError) as error:
        artifact.load(target, **options)
    assert is_one_line(error.value), str(error.value)
    return str(error.value)


def test_a_whole_folder_loads(download):
    with only_inside(download):
        assert artifact.load(download).stage == "shrinking"


@many
@given(data=st.data())
def test_any_description_is_read_or_refused_in_one_line(download, data):
    path = download / "soundwave.json"
    kept = path.read_bytes()
    described = json.loads(kept) | {
        "recipe": {"data": {"train": [{"shards": "x"}], "ctc_text": "raw"}},
        "step": 3,
    }
    try:
        write_json(path, data.draw(json_documents(described)))
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        with only_inside(download):
            config = artifact.read_config(download)
            (
                inheritance.inherited_options(download),
                artifact.describe(download).get("recipe", {}).get("data", {}).get("ctc_text"),
            )
        assert (
            isinstance(config.llm.lora_r, int)
            and isinstance(config.encoder.name, str)
            and isinstance(config.prompt, str)
        )
    except (SourceError, inheritance.StartError) as error:
        assert is_one_line(error)
    finally:
        path.write_bytes(kept)


@settings(few, max_examples=8)
@given(data=st.data())
def test_a_description_that_is_read_is_built_or_refused_in_one_line(download, data):
    path = download / "soundwave.json"
    kept = path.read_bytes()
    numbers = st.sampled_from([0, 1, 2, 3, 7, 1000, 10**9, 2**40, 2**62])
    choices = {
        "alignment": ("stack_frames", "layers", "heads", "ffn_multiple"),
        "shrinking": ("heads",),
        "llm": ("lora_r",),
    }
    part = data.draw(st.sampled_from(sorted(choices)))
    key, value = data.draw(st.sampled_from(choices[part])), data.draw(numbers)
    try:
        change(path, lambda d: d["config"][part].update({key: value}))
        artifact.load(download, with_llm=part != "alignment")
    except SourceError as error:
        assert is_one_line(error)
    finally:
        path.write_bytes(kept)


@few
@given(
    data=st.data(),
    name=st.sampled_from(
        ["llm/config.json", "whisper/config.json", "llm/tokenizer.json", "llm/tokenizer_config.json"]
    ),
)
def test_any_file_of_the_frozen_parts_is_read_or_refused_in_one_line(download, data, name):
    path = download / name
    kept = path.read_bytes()
    try:
        if data.draw(st.booleans()) and name != "llm/tokenizer.json":
            write_json(path, data.draw(json_documents(json.loads(kept))))
        else:
            path.write_bytes(data.draw(damaged_bytes(kept)))
        source = locate(str(path.parent))
        if "llm" in name:
            load_tokenizer(source, "<audio_patch>")
    except SourceError as error:
        assert is_one_line(error)
    finally:
        path.write_bytes(kept)


@few
@given(
    data=st.data(),
    name=st.sampled_from(["adapters.safetensors", "lora/adapter_model.safetensors", "llm/model.safetensors"]),
)
def test_any_tensors_are_read_or_refused_in_one_line(download, data, name):
    path = download / name
    kept = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged_bytes(kept[:600])) + kept[600:])
        if name.startswith("llm"):
            fingerprint(path.parent)
        else:
            artifact._shapes(path)
    except SourceError as error:
        assert is_one_line(error)
    finally:
        path.write_bytes(kept)


# ------------------------------------------------------------------------------------------------ cases


def test_nothing_in_a_description_is_looked_up(download, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    change(
        download / "soundwave.json",
        lambda d: d["config"].update(system_prompt="${oc.env:HF_TOKEN} ${a} ${ ???"),
    )
    assert artifact.read_config(download).system_prompt == "${oc.env:HF_TOKEN} ${a} ${ ???"
    change(download / "soundwave.json", lambda d: d["config"]["llm"].update(name="evil/${oc.env:HF_TOKEN}"))
    told = refused(download)
    assert "evil/${oc.env:HF_TOKEN}" in told and "SECRET" not in told


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda d: d.pop("config"), "'config' is missing or not as training writes it"),
        (lambda d: d.update(config=None), "'config' is missing"),
        (lambda d: d.update(config=[1]), "'config' is missing"),
        (lambda d: d.update(stage="last"), "stage 'last' is not known; did you mean"),
        (lambda d: d.update(stage=["sft"]), "'stage' is missing"),
        (lambda d: d.update(frozen={"llm": "../x"}), "'frozen' is missing"),
        (lambda d: d.update(settings={"llm": 1}), "'settings'"),
        (lambda d: d.update(recipe={"data": [1]}), "'recipe' is missing"),
        (lambda d: d.update(step="9"), "'step' is missing"),
        (lambda d: d["config"].update(evil=1), "evil: Unexpected keyword argument"),
        (lambda d: d["config"]["llm"].update(evil=1), "llm.evil: Unexpected keyword argument"),
        (
            lambda d: d["config"]["encoder"].update(max_seconds="x"),
            "encoder.max_seconds: Input should be a valid number",
        ),
        (
            lambda d: d["config"]["encoder"].update(max_seconds=float("nan")),
            "encoder.max_seconds: Input should be a finite number",
        ),
        (
            lambda d: d["config"]["alignment"].update(attention="x"),
            "alignment.attention is 'x': give time or frame",
        ),
        (
            lambda d: d["config"]["alignment"].update(layers=10**9),
            "alignment.layers is 1000000000: give at most",
        ),
        (lambda d: d["config"]["alignment"].update(layers=3), "alignment does not fit"),
        (lambda d: d["config"]["alignment"].update(heads=7), "heads = 7 does not divide"),
        (lambda d: d["config"]["llm"].update(lora_r=10**9), "its LoRA does not fit"),
        (
            lambda d: d["config"]["llm"].update(name="../../no-such-folder"),
            "model folder ../../no-such-folder does not exist",
        ),
        (lambda d: d["config"]["llm"].update(name="/nowhere"), "model folder /nowhere does not exist"),
    ],
)
def test_descriptions_that_are_refused(download, edit, says):
    change(download / "soundwave.json", edit)
    assert says in refused(download)


@pytest.mark.parametrize(
    "content, says", [("{", "is not valid JSON"), ("[1]", "does not hold a JSON object"), ("", "not valid")]
)
def test_a_broken_description_is_one_line(download, content, says):
    (download / "soundwave.json").write_text(content)
    assert says in refused(download)


CODE = "open({mark!r}, 'w')\nfrom transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"


@pytest.mark.parametrize(
    "file, edit",
    [
        (
            "llm/config.json",
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            },
        ),
        ("llm/config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}),
        (
            "llm/tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        ),
        ("llm/generation_config.json", {"custom_generate": "evil"}),
        ("whisper/config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    ],
)
def test_code_of_a_folder_is_not_run(download, monkeypatch, file, edit):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    mark = download / "ran"
    for place in (download, (download / file).parent):
        (place / "evil.py").write_text(CODE.format(mark=str(mark)))
    change(download / file, lambda d: d.update(edit))
    try:
        artifact.load(download)  # where the library has its own code for the family, it uses that
    except SourceError as error:
        assert is_one_line(error)
    assert not mark.exists()


def with_index(download, file):
    """The LLM's tensors in another file, with an index that says where."""
    whole = download / "llm" / "model.safetensors"
    target = download / "llm" / file
    shutil.move(whole, target)
    names = list(load_file(target))
    write_json(
        download / "llm" / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(names, file)},
    )


def test_an_index_of_tensors_names_files_of_its_folder(download):
    with_index(download, "part-1.safetensors")
    assert artifact.load(download).stage == "shrinking"
    for file in ("../../outside.safetensors", "/etc/passwd", "..", "a\0b", 5, None, ["x"]):
        change(
            download / "llm" / "model.safetensors.index.json",
            lambda d, file=file: d.update(weight_map=dict.fromkeys(d["weight_map"], file)),
        )
        with (
            only_inside(download / "llm"),
            pytest.raises(SourceError, match="the file name .*: copy the model again") as error,
        ):
            tensor_files(download / "llm")
        assert is_one_line(error.value)
    (download.parent / "outside.safetensors").write_bytes(
        (download / "llm" / "part-1.safetensors").read_bytes()
    )
    change(
        download / "llm" / "model.safetensors.index.json",
        lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], "../../outside.safetensors")),
    )
    assert "is a path, not a plain file name" in refused(download)


@pytest.mark.parametrize(
    "file",
    [
        "adapters.safetensors",
        "lora/adapter_model.safetensors",
        "llm/model.safetensors",
        "whisper/model.safetensors",
    ],
)
@pytest.mark.parametrize("head", [b"\xff" * 7 + b"\x7f{}", (1 << 40).to_bytes(8, "little"), b""])
def test_headers_of_tensors_that_are_none(download, file, head):
    content = (download / file).read_bytes()
    (download / file).write_bytes(head + content[len(head) :] if head else b"")
    assert file.split("/")[-1] in refused(download)


def test_sizes_that_do_not_go_together_are_one_line(download):
    config = download / "llm" / "config.json"
    for edit, says in (
        ({"vocab_size": 2**40}, "size"),
        ({"hidden_size": 64}, ""),
        ({"num_hidden_layers": "x"}, ""),
        ({"num_hidden_layers": 2**31}, "more than any model"),
        ({"rope_parameters": 5}, ""),
        ({"num_hidden_layers": MOST_LAYERS + 1}, "more than any model"),
        ({"model_type": "whisper"}, ""),
        ({"model_type": "nothing"}, ""),
    ):
        kept = config.read_bytes()
        change(config, lambda d, edit=edit: d.update(edit))
        assert says in refused(download)
        config.write_bytes(kept)
    tensors = load_file(download / "llm" / "model.safetensors")
    save_file(
        {name: tensor[:1] if "embed" in name else tensor for name, tensor in tensors.items()},
        download / "llm" / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(download)


def test_a_pickle_is_no_weights(download):
    tensors = load_file(download / "llm" / "model.safetensors")
    (download / "llm" / "model.safetensors").unlink()
    torch.save(tensors, download / "llm" / "pytorch_model.bin")
    assert "has no model.safetensors" in refused(download)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% for",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{{ messages[99].role }}",
        "{{ raise() }}",
    ],
)
def test_a_template_that_fails_is_one_line(download, tmp_path, capsys, template):
    (download / "llm" / "chat_template.jinja").write_text(template)
    clip = tmp_path / "clip.flac"
    clip.write_bytes(sound(0.5, 1))
    change(download / "soundwave.json", lambda d: d.pop("settings", None))  # where the template is recorded
    assert answer.main([str(download), str(clip), "--device", "cpu", "--max-new-tokens", "2"]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("error: ") and "Traceback" not in output


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"audio_tower": 5}', '{"hidden_size": "x"}', '{"audio_tower": "../../etc"}']
)
def test_a_release_s_folder_that_is_none_is_one_line(download, tmp_path, capsys, content):
    (download / "llm" / "config.json").write_text(content)
    assert convert(["--from-official", str(download / "llm"), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("error: ") and "Traceback" not in output


def test_no_call_leaves_remote_code_to_a_question():
    """transformers asks on the terminal where trust_remote_code is not given."""
    found = []
    for package in (*PACKAGES, "examples", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr == "from_pretrained"
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id.startswith("Auto")
                ):
                    given = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
                    if given.get("trust_remote_code") is not False:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
