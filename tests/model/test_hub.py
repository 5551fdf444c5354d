"""The folder that plain transformers loads: equal answers, options, round trip; and its way to the Hub."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModel, AutoProcessor

import core
from model import artifact, push
from model.export import main as export
from model.hub.bundle import BundleError, Place, bundle
from model.hub.layout import source_files
from tests.model import tiny
from tests.model.clean_environment import environment, python
from tests.model.conftest import build

CLIENT = Path(__file__).with_name("hub_client.py")


def exported(model, root: Path, extra: dict | None = None, scores: dict | None = None) -> Path:
    run = artifact.save(model, root / "sft" / "model", extra)
    if scores:
        (run / "evaluation").mkdir()
        (run / "evaluation" / "dialogues-test-asr.scores.json").write_text(json.dumps(scores))
    assert export([str(run), "--out", str(root / "hub"), "--hub-layout"]) == 0
    return root / "hub"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("clips"), torch.Generator().manual_seed(0)
    paths = []
    for number, seconds in enumerate((0.7, 1.6, 1.1)):
        samples = 0.1 * torch.randn(round(16_000 * seconds), generator=generator)
        paths.append(folder / f"{number}.wav")
        soundfile.write(paths[-1], samples.numpy(), 16_000, subtype="FLOAT")
    return paths


def right(model, clips) -> list[list[int]]:
    """The project's own answers, one conversation after the other."""
    ids = []
    for number, clip in enumerate(clips):
        chat = [{"role": "user", "content": f"<audio_patch>\nSay {number}"}]
        waveform = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
        ids.append(model.generate(model.prompts([chat], [waveform]), max_new_tokens=15)[0])
    return ids


def without_end(rows: list[list[int]], stop: list[int]) -> list[list[int]]:
    return [row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows]


def hub_answers(folder: Path, clips, **options) -> list[list[int]]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "audio", "audio": str(clip)}, {"type": "text", "text": f"Say {number}"}],
            }
        ]
        for number, clip in enumerate(clips)
    ]
    inputs = processor.apply_chat_template(chats)
    return without_end(
        model.generate(**inputs, max_new_tokens=15).tolist(), model.generation_config.eos_token_id
    )


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.slow  # starts Python and imports torch
def test_loads_without_this_project_and_gives_equal_answers(folders, tmp_path, clips):
    made = build(folders)
    hub = exported(made, tmp_path)
    packages = environment(tmp_path / "packages", ["torch", "transformers", "soundfile"])
    (tmp_path / "home").mkdir()
    found = json.loads(
        python(packages, CLIENT, str(hub), *map(str, clips), home=tmp_path / "home").splitlines()[-1]
    )
    expected, stop = (
        right(made, clips),
        json.loads((hub / "generation_config.json").read_text())["eos_token_id"],
    )
    assert found["project"] == [] and found["report"] == {}
    for which in ("ids", "round trip"):
        assert without_end(found[which], stop) == expected, which
    for which in ("eager", "sdpa"):
        assert found[which][0] == [which] and without_end(found[which][1], stop) == expected
    assert without_end(found["one"], stop) == expected[:1]
    assert found["text"] == made.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert found["pipeline"] == found["text"][0]
    hello = made.prompts([[{"role": "user", "content": "Hello."}]])
    assert without_end(found["text only"], stop) == made.generate(hello, max_new_tokens=5)
    assert found["tied"] and found["dtypes"] == ["torch.bfloat16"] and found["adapters"] == ["torch.float32"]
    for which in ("flash", "unknown attention", "device map"):  # accelerate is not there
        assert "\n" not in found[which].strip() and "Error" in found[which]


@pytest.mark.parametrize(
    "family, alignment, shrinking",
    [
        ("llama", {}, {"token_embeddings": True}),
        ("qwen3", {"ctc_head": "free"}, {"lookback": "kept", "keep": "first"}),
        ("gemma3_text", {"ctc_head": "initialised", "layers": 0}, {"enabled": False}),
        (
            "llama_tied",
            {"attention": "frame", "stack_frames": 3},
            {"lookback": "none", "keep_blank_runs": True},
        ),
    ],
)
def test_every_switch_is_followed(folders, tmp_path, clips, family, alignment, shrinking):
    config = tiny.config(folders("whisper"), folders(family), **alignment)
    for name, value in shrinking.items():
        setattr(config.shrinking, name, value)
    torch.manual_seed(4)
    made = type(build(folders)).build(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or name.startswith("shrinking.out"):
                parameter.normal_(0, 0.1)
    assert hub_answers(exported(made, tmp_path), clips) == right(made, clips)


def test_device_maps_are_honoured(folders, tmp_path, clips):
    made = build(folders)
    hub, expected = exported(made, tmp_path), right(made, clips)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert hub_answers(hub, clips, device_map=device_map) == expected
    parts = dict.fromkeys(("encoder", "alignment", "ctc_head", "shrinking", "llm"), "cpu")
    parts.pop("llm")
    parts |= {"llm.model.embed_tokens": "cpu", "llm.lm_head": "cpu", "llm.model.norm": "cpu"}
    parts |= {"llm.model.rotary_emb": "cpu", "llm.model.layers.0": "cpu", "llm.model.layers.1": "disk"}
    spread = {"device_map": parts, "offload_folder": str(tmp_path / "offload")}
    assert hub_answers(hub, clips, **spread) == expected


def test_users_text_stays_text(folders, tmp_path, clips):
    made = build(folders)
    hub = exported(made, tmp_path)
    processor = AutoProcessor.from_pretrained(hub, trust_remote_code=True)
    question = "<|im_end|>\n<|im_start|>assistant\n<audio_patch>"
    inputs = processor(text=question, audio=str(clips[0]))
    chat = [{"role": "user", "content": f"<audio_patch>\n{question}", "audios": 1}]
    waveform = torch.from_numpy(soundfile.read(clips[0], dtype="float32")[0])
    assert inputs["input_ids"].tolist() == made.prompts([chat], [waveform]).input_ids.tolist()
    for wrong in (
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "audio", "audio": torch.zeros(0)}]}],
        [{"role": "user", "content": [{"type": "audio", "audio": torch.full((10,), float("nan"))}]}],
    ):
        with pytest.raises(ValueError) as error:
            processor.apply_chat_template(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="tokenize=False"):
        processor.apply_chat_template(chat, tokenize=False)


def test_generated_files_are_whole_and_name_nothing_of_the_project():
    for name, text in source_files().items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in ("model", "core", "peft", "pydantic"), name
        assert "Generated by" in ast.get_docstring(tree)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes core.bundled of files' texts."""
    monkeypatch.setattr(core, "__path__", [*core.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "core.bundled", raising=False)
    yield lambda files: write_package(tmp_path / "bundled", {"__init__.py": "", **files})
    sys.modules.pop("core.bundled", None)


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "files, problem",
    [
        ({"main.py": "from core.bundled.a import x as y\nz = y\n", "a.py": "x = 1\n"}, "use its own name"),
        (
            {"main.py": "def f():\n    from core.bundled.a import x\n    return x\n", "a.py": "x = 1\n"},
            "at the top",
        ),
        (
            {
                "main.py": "from core.bundled.a import f\ndef g():\n    return 1\ndef h():\n    return f() + g()\n",
                "a.py": "def f():\n    return g\ndef g():\n    return 2\n",
            },
            "both define g",
        ),
        (
            {
                "main.py": "from core.bundled.a import f\nx = f\ndef g():\n    return 1\n",
                "a.py": "def f():\n    return g()\ndef g():\n    return 2\n",
            },
            "both define g",
        ),
    ],
)
def test_what_cannot_be_bundled_is_an_error(package, files, problem):
    package(files)
    with pytest.raises(BundleError, match=problem):
        bundle("core.bundled.main")


def test_a_bundle_takes_what_is_needed_and_nothing_else(package):
    files = {
        "main.py": '"""Doc."""\nfrom core.bundled import a\nfrom core.bundled.c import C\n\nclass M:\n    run = C.run\n\nv = a.f()\n',
        "a.py": "import math\n\n# why\nK = 3\n\ndef f():\n    return K + used()\n\ndef used():\n    return 4\n\ndef unused():\n    return math.pi\n",
        "b.py": "def used():\n    return 40\n",
        "c.py": "from core.bundled.a import K\n\nclass C:\n    def other(self): ...\n\n    def run(self):\n        return K\n",
    }
    package(files)
    text = bundle(
        "core.bundled.main", instead={Place("core.bundled.a", "used"): Place("core.bundled.b", "used")}
    )
    space: dict = {}
    exec(text, space)
    assert space["v"] == 43 and space["M"]().run() == 3 and "# why" in text
    assert "unused" not in text and "math" not in text and "other" not in text


def test_the_card_has_the_hubs_metadata(folders, tmp_path):
    asr = {"utterances": 99, "wer": 0.4321, "wer_ci95": [0.4, 0.5], "exact": 0.125}
    scores = {"tasks": {"asr": asr, "chain": {"utterances": 3, "exact": 0.5}}}
    made = build(folders)
    made.config.llm.name = folders("llama_tied")
    hub = exported(made, tmp_path, scores=scores)
    data = ModelCard((hub / "README.md").read_text()).data
    assert data.library_name == "transformers" and data.base_model is None  # folders are no ids of the hub
    wer, exact, chain = data.eval_results
    assert (chain.task_name, chain.metric_value) == ("chain", 50.0)
    assert (wer.task_type, wer.metric_type, wer.metric_value) == (
        "automatic-speech-recognition",
        "wer",
        43.21,
    )
    assert (wer.dataset_name, exact.metric_type, exact.metric_value) == (
        "dialogues-test-asr",
        "exact_match",
        12.5,
    )
    assert "trust_remote_code=True" in (hub / "README.md").read_text()
    for path in hub.glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text(), path  # no folder of this machine


# ---- the Hub ----


class StandIn(ThreadingHTTPServer):
    """The part of the Hub's API that an upload uses: a repository, LFS objects, one commit."""

    def __init__(self, fail: str | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fail, self.requests, self.objects, self.commits = fail, [], {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, url = self.path.split("?")[0], self.server.url
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        status, out = 200, {}
        if self.server.fail and self.server.fail in path:
            status, out = 403, {"error": "You may not.\nAt all."}
        elif path == "/api/repos/create":
            out = {"url": f"{url}/team/speech", "name": "team/speech", "id": "1"}
        elif "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            out = {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": modes[one["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for one in files
                ]
            }
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            out = {"transfer": "basic", "objects": objects}
        elif path.startswith("/lfs/"):
            self.server.objects[path.removeprefix("/lfs/")] = body
        elif "/commit/" in path:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            out = {"commitOid": "0" * 40, "commitUrl": f"{url}/team/speech/commit/0", "success": True}
        data = json.dumps(out).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_server(monkeypatch):
    def start(fail: str | None = None) -> StandIn:
        server = StandIn(fail)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        return server

    started: list[StandIn] = []
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_folder_is_pushed_in_one_commit(folders, tmp_path, hub_server, capsys):
    hub = exported(build(folders), tmp_path)
    (hub / "__pycache__").mkdir()
    (hub / "__pycache__" / "modeling.pyc").write_bytes(b"x")
    server = hub_server()
    capsys.readouterr()
    assert push.main([str(hub), "team/speech", "--private"]) == 0
    assert capsys.readouterr().out.strip() == f"{server.url}/team/speech/commit/0"
    [commit] = server.commits
    names = {line["value"]["path"] for line in commit if line["key"] in ("file", "lfsFile")}
    assert names == {path.name for path in hub.iterdir() if path.is_file()}
    [weights] = [line["value"] for line in commit if line["key"] == "lfsFile"]
    data = (hub / "model.safetensors").read_bytes()
    assert server.objects[weights["oid"]] == data and weights["oid"] == hashlib.sha256(data).hexdigest()
    assert all(
        token == "Bearer hf_secret" for _, path, token in server.requests if path.startswith("/api/repos")
    )


def test_a_dry_run_needs_no_network(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub = exported(build(folders), tmp_path)
    capsys.readouterr()
    assert push.main([str(hub), "team/speech", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "modeling_soundwave.py" in out and f"{(hub / 'model.safetensors').stat().st_size:,}" in out


def test_what_cannot_be_pushed_is_one_line(folders, tmp_path, hub_server, capsys, monkeypatch):
    hub = exported(build(folders), tmp_path)
    hub_server("/preupload/")

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert push.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "hf_secret" not in error
        return error

    assert "could not be pushed" in refused(str(hub), "team/speech")
    assert "is no export" in refused(str(tmp_path), "team/speech")
    assert "no name" in refused(str(hub), "team/spe ech") and "no owner" in refused(str(hub), "speech")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "there is no token" in refused(str(hub), "team/speech")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(str(hub), "team/speech")
    (hub / "link").symlink_to(hub / "config.json")
    assert "is a link" in refused(str(hub), "team/speech")
