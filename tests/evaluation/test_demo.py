"""The page: what it refuses and how it ends, and, in a real browser (Debian's chromium, headless, driven by
playwright), its use.

The browser is not part of `make setup`: make setup EXTRAS="browser demo serve"; apt-get install chromium.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from core.audio import AudioError, decode
from core.samples import asked
from evaluation import demo
from evaluation.demo import QUESTION, Refusal, Talker
from evaluation.model_server import ModelServer, ServerError
from model import artifact
from model.generation.timestamps import align
from model.picture import ctc_peaks
from tests.core.sound import encoded
from tests.evaluation.conftest import SECONDS, sound
from tests.serving.conftest import serving


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.flac"
    path.write_bytes(sound(SECONDS[3], 3))
    return path


@pytest.fixture
def server(folders, request, tmp_path):
    """The page's own command, on a free port of this machine; another user's folder is where Gradio would put
    uploads."""
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch, log, examples = tmp_path / "tmp", tmp_path / "log", tmp_path / "examples"
    examples.mkdir()
    (examples / "hello there.flac").write_bytes(sound(SECONDS[3], 3))
    (examples / "notes.txt").write_text("no audio")
    (scratch / "gradio").mkdir(parents=True)
    (scratch / "gradio").chmod(0o555)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "evaluation.demo",
                str(folders / request.param),
                "--port",
                str(port),
                "--device",
                "cpu",
                "--max-new-tokens",
                "12",
                "--examples",
                str(examples),
            ],
            env=environment,
            stdout=out,
            stderr=out,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield SimpleNamespace(url=url, log=log, scratch=scratch)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    assert list(scratch.iterdir()) == [scratch / "gradio"], "uploads are gone"


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, body, {"Content-Type": kind}), timeout=120
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(server, content: bytes) -> tuple[int, str]:
    head = '--edge\r\nContent-Disposition: form-data; name="files"; filename="a.flac"\r\nContent-Type: audio/flac\r\n\r\n'
    return post(
        f"{server.url}/gradio_api/upload",
        head.encode() + content + b"\r\n--edge--\r\n",
        "multipart/form-data; boundary=edge",
    )


def ask(server, path: str, question: str) -> dict:
    """The last word on a question, as the page's own script gets it."""
    session = str(time.monotonic_ns())
    with urllib.request.urlopen(f"{server.url}/config", timeout=120) as response:
        events = json.loads(response.read())["dependencies"]
    number = next(event["id"] for event in events if len(event["inputs"]) == 2)  # audio and question
    body = {
        "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, question],
        "fn_index": number,
        "session_hash": session,
    }
    assert post(f"{server.url}/gradio_api/queue/join", json.dumps(body).encode())[0] == 200
    with urllib.request.urlopen(
        f"{server.url}/gradio_api/queue/data?session_hash={session}", timeout=120
    ) as lines:
        for line in lines:
            told = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if told.get("msg") == "process_completed":
                return told
    raise AssertionError("no answer")


@pytest.mark.slow
@pytest.mark.parametrize("server", ["shrinking"], indirect=True)
def test_what_strangers_send_costs_a_line(server, clip):
    own = server.scratch.glob("soundwave-demo-*")
    assert [folder.stat().st_mode & 0o777 for folder in own] == [0o700]
    status, told = upload(server, clip.read_bytes())
    assert status == 200
    path = json.loads(told)[0]
    assert ask(server, path, "What?")["success"]
    assert post(f"{server.url}/gradio_api/queue/join", b'{"data": ["' + b"x" * 40_000_000 + b'"]}')[0] == 413
    assert upload(server, b"x" * 120_000_000)[0] == 413  # 300 s as stereo at 48 kHz in 32 bits are 115.2 MB
    assert "more than 16,384 characters" in ask(server, path, "x" * 20_000)["output"]["error"]
    broken = json.loads(upload(server, b"no audio")[1])[0]
    told = ask(server, broken, "What?")["output"]["error"]
    assert told == f"the recording cannot be used: Format not recognised. {demo.FORMATS}"
    assert (
        not ask(server, "/etc/hostname", "What?")["success"]
        and not ask(server, "http://127.0.0.1/x", "What?")["success"]
    )
    assert (
        post(f"{server.url}/gradio_api/run/predict", b'{"data": [null, "x"], "fn_index": 0}')[0] == 404
    )  # past the queue
    assert ask(server, path, "What?")["success"]
    log = server.log.read_text()
    assert "Traceback" not in log and "error: a request was refused: " in log
    with urllib.request.urlopen(f"{server.url}/config", timeout=60) as response:
        assert str(server.scratch.parent) not in response.read().decode()


@pytest.fixture
def browser(tmp_path):
    """chromium with a microphone that plays a file."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    spoken = tmp_path / "spoken.wav"
    soundfile.write(spoken, [0.1, -0.1] * 48000, 48000)
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={spoken}",
            ],
        )
        yield program
        program.close()


@pytest.fixture(scope="module")
def models(folders):
    return {stage: artifact.load(folders / stage) for stage in ("alignment", "shrinking")}


@pytest.fixture(scope="module")
def started(models):
    """Stage -> the server and its address, in this process."""
    with serving(models["alignment"], name="one") as one, serving(models["shrinking"], name="two") as two:
        yield {"alignment": one, "shrinking": two}


@pytest.fixture(scope="module")
def talkers(started):
    """Stage -> the page's side of its server."""
    return {stage: Talker(ModelServer(url)) for stage, (_, url) in started.items()}


@pytest.mark.parametrize(
    "stage, question", [("shrinking", QUESTION), ("shrinking", "Who speaks?"), ("alignment", "")]
)
def test_the_page_shows_what_the_model_makes_of_a_clip(models, talkers, clip, stage, question):
    """Words: of the answer where it is a transcript, else of the CTC transcript."""
    model, waveform = models[stage], torch.from_numpy(decode(str(clip)).samples)
    *_, (answer, transcript, picture, times, rows) = talkers[stage].stream_answer(str(clip), question)
    batch = model.prompts([[asked(question)]], [waveform])
    right = model.ctc_greedy(batch)[0]
    assert transcript == (right if stage == "shrinking" else " ".join(right.split()))
    if stage == "shrinking":
        assert answer == model.answer([[asked(question)]], [waveform], max_new_tokens=12)[0]
    else:
        assert "has no LLM" in answer
    aligned = align(model, [waveform], [answer if question == QUESTION else transcript])[0]
    assert [row[0] for row in rows] == [word.text for word in aligned.words] != []
    assert [float(row[1]) for row in rows] == pytest.approx([w.start for w in aligned.words], abs=6e-3)
    right = model.inspect(batch)
    assert f"| frames | {len(right['tokens'][0])}, {len(right['kept'][0])} kept" in times
    lines = picture.axes[0].collections[0].get_segments()  # a line at each compressed frame
    assert [line[0][0] for line in lines] == pytest.approx(
        [(place + 0.5) / right["frame_rate"] for place in right["kept"][0].tolist()]
    )
    tokens = [text.get_text() for text in picture.axes[2].texts]
    assert len(tokens) == len(ctc_peaks(right["tokens"][0], right["peak"][0], right["blank"]))


def test_the_answer_is_shown_as_it_comes(talkers, clip, monkeypatch):
    talker = talkers["shrinking"]
    *_, chunk = talker.server.stream_answer(clip.read_bytes(), "Who?", ["frames"])
    monkeypatch.setattr(
        talker.server, "stream_answer", lambda *_: (piece for piece in ["A man", " speaks.", chunk])
    )
    outputs = list(talker.stream_answer(str(clip), "Who?"))
    assert [output[0] for output in outputs] == ["A man", "A man speaks.", "A man speaks."]
    assert outputs[0][1:3] == (None, None) and None not in outputs[-1]


def test_words_are_shown_as_text():
    shown = demo.table([["<b>&", "0.10", "0.25", "0.90"]])
    assert "<td>&lt;b&gt;&amp;</td><td>0.10</td><td>0.25</td><td>0.90</td>" in shown and "<b>" not in shown
    assert demo.table([]) == ""


def test_frames_of_windows_are_one_picture():
    entry = {
        "rate": 25.0,
        "blank": 9,
        "tokens": [9, 1],
        "texts": {"1": "a"},
        "blank_probability": [0.9, 0.1],
        "log_probability": [-0.1, -0.2],
        "kept": [1],
    }
    found, texts = demo.inspection_of([entry, entry | {"texts": {"2": "b"}, "kept": [0]}], torch.zeros(2560))
    assert found["tokens"][0].tolist() == [9, 1, 9, 1] and found["kept"][0].tolist() == [1, 2]
    assert found["seconds"] == [4 / 25] and texts == {1: "a", 2: "b"}


def test_examples_are_a_folder_s_first_audio_files(tmp_path):
    for name in ("b.wav", "a.MP3", "text.txt", *(f"z{number}.flac" for number in range(9))):
        (tmp_path / name).touch()
    assert [path.name for path in demo.example_clips(tmp_path)][:3] == ["a.MP3", "b.wav", "z0.flac"]
    assert len(demo.example_clips(tmp_path)) == 8 and demo.example_clips(None) == []
    with pytest.raises(ValueError, match="no audio file is there"):
        demo.example_clips(tmp_path / "missing")


def outside(requests: list[str], url: str) -> list[str]:
    return [request for request in requests if not request.startswith((url, "data:", "blob:"))]


def test_a_long_upload_is_refused_unread(talkers, tmp_path, monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *arguments, **options: pytest.fail("was decoded"))
    long, broken = tmp_path / "long.flac", tmp_path / "broken.flac"
    soundfile.write(long, np.zeros(301 * 8000), 8000)
    broken.write_bytes(b"no audio")
    with pytest.raises(Refusal, match="lasts 301 s, this model takes 300 s"):
        next(talkers["alignment"].stream_answer(str(long), ""))
    with pytest.raises(AudioError, match="Format not recognised") as error:
        next(talkers["alignment"].stream_answer(str(broken), ""))
    assert str(tmp_path) not in str(error.value), "a path of this machine"


def test_an_upload_that_takes_gigabytes_decoded_is_refused(talkers, tmp_path):
    """280 s of silence in 8 channels at 655 kHz: within the model's seconds, 5.9 GB as float32."""
    clip = bytearray(encoded(np.zeros((65_536, 8), np.int16), rate=96_000))
    packed = int.from_bytes(clip[18:26], "big") & ~(((1 << 20) - 1) << 44) & ~((1 << 36) - 1)
    clip[18:26] = (packed | 655_350 << 44 | 280 * 655_350).to_bytes(8, "big")
    path = tmp_path / "bomb.flac"
    path.write_bytes(bytes(clip) + bytes(50_000))
    with pytest.raises(AudioError, match="8 channels at 655,350 Hz are") as caught:
        next(talkers["alignment"].stream_answer(str(path), ""))
    assert caught.value.reason == "too_large" and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "question, line",
    [("x" * 16_385, "the chat has more than 16,384 characters"), ("x" * 600, "the conversation takes 6")],
)
def test_what_the_server_refuses_is_its_line(talkers, clip, question, line):
    with pytest.raises(Refusal, match=line):
        list(demo.shown(talkers["shrinking"], str(clip), question))


def test_an_answer_that_takes_too_long_is_stopped(started, talkers, clip, monkeypatch):
    monkeypatch.setitem(vars(started["shrinking"][0].limits), "request_seconds", 0.0)
    late = "the time limit of a request on this server was reached|body came too slowly"
    with pytest.raises(Refusal, match=late):
        list(demo.shown(talkers["shrinking"], str(clip), "Who speaks?"))


def test_what_goes_wrong_inside_is_a_line_without_names_of_this_machine(talkers, clip, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no memory for /home/someone/secret\nmore")

    talker = Talker(talkers["shrinking"].server)
    monkeypatch.setattr(talker, "_answer", fails)
    with pytest.raises(Refusal, match="the question could not be answered") as error:
        list(demo.shown(talker, str(clip), ""))
    assert "/home" not in str(error.value)
    log = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert log == "error: a question was not answered: no memory for /home/someone/secret\n"
    with pytest.raises(Refusal, match="the recording lasts &lt;b&gt;"):  # shown as HTML
        monkeypatch.setattr(
            talker, "_answer", lambda *_: (_ for _ in ()).throw(Refusal("the recording lasts <b>"))
        )
        list(demo.shown(talker, str(clip), ""))


def test_a_server_that_has_gone_is_one_line(models, clip, capsys):
    with serving(models["alignment"]) as (_, url):
        talker = Talker(ModelServer(url))
    with pytest.raises(Refusal, match="the server does not answer: try again later"):
        list(demo.shown(talker, str(clip), ""))
    assert capsys.readouterr().err.startswith(f"error: {url}/v1/audio/transcriptions: ")


@pytest.mark.parametrize("given", ["{url}", "{url}/", "{url}/v1"])
def test_a_server_with_a_key_is_asked_with_it(models, clip, given):
    with serving(models["alignment"], token="secret-of-ours") as (_, url):
        with pytest.raises(ServerError, match="the API key is missing or wrong"):
            ModelServer(given.format(url=url))
        talker = Talker(ModelServer(given.format(url=url), "secret-of-ours"))
        assert list(talker.stream_answer(str(clip), ""))


@pytest.mark.parametrize(
    "host, local",
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("::", False),
        ("gpu7", False),
    ],
)
def test_addresses_of_this_machine_alone(host, local):
    assert demo.is_loopback(host) == local


def test_the_login_comes_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("PAGE", "me:pa:ss")
    assert demo.login("PAGE") == ("me", "pa:ss") and demo.login(None) is None
    for value in ("", "me", "me:", ":ss"):
        monkeypatch.setenv("PAGE", value)
        with pytest.raises(ValueError, match="set this environment variable to USER:PASSWORD"):
            demo.login("PAGE")


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "give a model folder, or --server URL"),
        (["model", "--server", "http://127.0.0.1:1"], "give a model folder, or --server URL"),
        (["model", "--token-env", "KEY"], "--token-env needs --server"),
    ],
)
def test_wrong_commands_are_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["missing"], "error: the server did not start"),
        (["--server", "http://127.0.0.1:1"], "error: the server does not answer: try again later"),
        (["--server", "127.0.0.1:8000"], "is not an http or https address"),
        (["--server", "http://127.0.0.1:1", "--token-env", "NO_KEY"], "set this environment variable"),
    ],
)
def test_a_page_without_a_model_ends_with_one_line(arguments, line, capsys, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.delenv("NO_KEY", raising=False)
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error.splitlines()[-1] and "Traceback" not in error
    assert arguments != ["missing"] or "missing is not a model folder" in error


def test_who_leaves_ends_the_generation(started, talkers, clip, monkeypatch):
    server = started["shrinking"][0]
    monkeypatch.setitem(vars(server.limits), "new_tokens", 400)
    pieces = talkers["shrinking"].stream_answer(str(clip), "Who speaks?")
    next(pieces)
    assert server.engine.running
    pieces.close()
    began = time.monotonic()
    while server.engine.running:
        assert time.monotonic() < began + 30
        time.sleep(0.01)
    tokens = server.metrics.tokens._value.get()
    assert (
        list(talkers["shrinking"].stream_answer(str(clip), QUESTION))
        and server.metrics.tokens._value.get() > tokens
    )


def test_warnings_are_shown_with_the_answer(models, talkers, tmp_path, monkeypatch):
    """Channels that cancel out, and a clip longer than any in training."""
    wave = 0.3 * np.sin(np.arange(16000) / 10)
    soundfile.write(tmp_path / "opposite.wav", np.stack([wave, -wave], 1), 16000)
    for stage, talker in talkers.items():
        monkeypatch.setattr(models[stage], "trained_seconds", 0.5)
        *_, (_, _, _, times, _) = talker.stream_answer(str(tmp_path / "opposite.wav"), "What?")
        assert "| **warning** | its 2 channels cancel out" in times, stage
        assert "1.0 s, the model was trained on clips of at most 0.5 s" in times or stage == "alignment"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["shrinking"], indirect=True)
def test_upload_ask_see(server, browser, clip):
    tab = browser.new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(server.url)
    tab.get_by_role("button", name="Ask").wait_for(timeout=120_000)
    assert tab.locator("#question textarea, #question input").input_value() == QUESTION
    tab.get_by_role("button", name="Ask").click()  # without audio: a message, no crash
    tab.get_by_text("record or upload some first").wait_for(timeout=60_000)
    tab.get_by_text("record or upload some first").wait_for(state="hidden", timeout=60_000)
    tab.get_by_role("button", name="Upload file").click()
    tab.locator("input[type=file]").set_input_files(str(clip))
    tab.get_by_role("button", name="Play", exact=True).wait_for(timeout=60_000)
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("real-time factor").wait_for(timeout=120_000)
    times = tab.locator("#timings").inner_text()
    assert f"{SECONDS[3]:.2f} s" in times and "time to first words" in times
    assert re.search(r"53, \d+ kept", times)  # 2.1 s: 105 encoder frames, by twos
    assert tab.locator("#transcript textarea").input_value() or tab.locator("#answer textarea").input_value()
    assert tab.locator("#picture img").count() == 1
    assert tab.evaluate("document.querySelector('#picture img').naturalWidth") > 300
    assert tab.locator("#microphone").inner_text().strip() == ""  # 127.0.0.1 is a secure context
    assert re.search(r"\d\.\d\d", tab.locator("#words").inner_text())
    tab.goto(server.url)  # and once more with an example
    tab.get_by_text("hello there").click(timeout=120_000)
    tab.get_by_role("button", name="Play", exact=True).wait_for(timeout=60_000)
    assert outside(asked, server.url) == []  # the page works without a network, and sends nothing


@pytest.mark.slow
@pytest.mark.parametrize("server", ["alignment"], indirect=True)
def test_microphone_of_a_stage_one_model(server, browser):
    context = browser.new_context(permissions=["microphone"])
    tab = context.new_page()
    tab.goto(server.url)
    tab.get_by_role("button", name="Ask").wait_for(timeout=120_000)
    assert tab.locator("#question").count() == 0  # nothing to ask without an LLM
    tab.get_by_role("button", name="Record", exact=True).click()
    tab.wait_for_timeout(2500)
    tab.get_by_role("button", name="Stop").first.click()
    tab.get_by_role("button", name="Play", exact=True).wait_for(timeout=60_000)
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("real-time factor").wait_for(timeout=120_000)
    seconds = float(re.search(r"audio\s+([\d.]+) s", tab.locator("#timings").inner_text()).group(1))
    assert 1 < seconds < 10
    assert "has no LLM" in tab.locator("#answer textarea").input_value()
