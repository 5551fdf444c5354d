"""The server with its LLM in another process: the same answers, and what happens when that process ends.

Without vLLM's environment the process is tests/serving/transformers_worker.py, which speaks the same protocol.
"""

from __future__ import annotations

import copy
import json
import random
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch

from model import artifact
from model.export import export_llm
from model.language_model import base_of, context_length
from soundwave.recogniser import SpeechModel
from soundwave.vllm import PYTHON, VLLM, BackendError
from tests.serving.conftest import build, part, serving, wav
from tests.serving.test_load import KINDS, ask, expected

openai = pytest.importorskip("openai")
STAND_IN = Path(__file__).with_name("transformers_worker.py")


@pytest.fixture(scope="module")
def merged(model, tmp_path_factory):
    """The model's LLM with LoRA merged, in fp32."""
    root = tmp_path_factory.mktemp("merged")
    return export_llm(artifact.save(model, root / "sft" / "model"), root / "llm")


def start(model, merged, rows: int = 8) -> VLLM:
    context = context_length(base_of(model.llm).config)
    return VLLM(merged, dtype="float32", rows=rows, positions=context, python=sys.executable, worker=STAND_IN)


def without_layers(model):
    """The model as the server keeps it beside vLLM."""
    front = copy.deepcopy(model)
    base_of(front.llm).get_decoder().layers = torch.nn.ModuleList()
    return front


@pytest.fixture(scope="module")
def shared(model, merged):
    """Yields the server and its address; the last test that uses it ends its process."""
    with serving(without_layers(model), vllm=start(model, merged), batch_rows=8) as started:
        yield started


def engine_of(vllm: VLLM) -> int:
    """The pid of the process that the worker has started."""
    return int(re.search(r"engine (\d+)", vllm.log.read_text())[1])


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def chat(url: str, tokens: int, timeout: float = 60):
    content = [part(wav(0.5)), {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages, "max_tokens": tokens}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)


def test_fifty_requests_at_once_get_the_offline_answers(model, shared):
    server, url = shared
    wanted = [(KINDS[number % len(KINDS)], number) for number in range(50)]
    right = {request: expected(model, *request) for request in wanted}
    random.Random(0).shuffle(wanted)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = dict(zip(wanted, pool.map(lambda request: ask(client, *request), wanted), strict=True))
    assert found == right
    wait_for(lambda: not server.engine.sent)


def test_words_have_the_times_of_the_batch_that_encoded_them(model, shared):
    clip = wav(1.1, 1)
    client = openai.OpenAI(base_url=f"{shared[1]}/v1", api_key="none", max_retries=0)
    found = client.audio.transcriptions.create(
        model="tiny", file=("c.wav", clip), response_format="verbose_json", timestamp_granularities=["word"]
    )
    right = SpeechModel(model).transcribe(clip, max_new_tokens=12, timestamps="word").words
    assert [(word.word, word.start) for word in found.words] == [
        (word.text, pytest.approx(word.start, abs=1e-3)) for word in right
    ]
    assert right


def test_a_client_that_leaves_frees_the_row(shared):
    server, url = shared
    object.__setattr__(server.limits, "new_tokens", 1500)
    with pytest.raises(httpx2.TimeoutException):
        chat(url, 1500, timeout=0.4)
    wait_for(lambda: not server.engine.sent and "cancelled" in server.engine.vllm.log.read_text())
    assert chat(url, 3).status_code == 200


def test_requests_end_with_503_when_the_process_has_ended(shared):
    server, url = shared
    object.__setattr__(server.limits, "new_tokens", 1500)
    server.engine.vllm.process.send_signal(signal.SIGSTOP)  # it answers nothing before it is killed
    found: list[int] = []
    first = threading.Thread(target=lambda: found.append(chat(url, 1500).status_code))
    first.start()
    wait_for(lambda: server.engine.sent)
    assert httpx2.get(f"{url}/health").status_code == 200
    server.engine.vllm.process.kill()
    first.join(60)
    found.append(chat(url, 3).status_code)
    assert found == [503, 503]
    wait_for(lambda: not is_alive(engine_of(server.engine.vllm)))
    assert httpx2.get(f"{url}/health").status_code == 503


def test_what_is_open_is_answered_before_the_server_ends(model, merged):
    vllm = start(model, merged, rows=2)
    engine = engine_of(vllm)
    with serving(without_layers(model), vllm=vllm, batch_rows=2) as (server, url):
        most = 0

        def watch() -> bool:
            nonlocal most
            most = max(most, len(server.engine.sent))
            return all(answer.done() for answer in answers)

        with ThreadPoolExecutor(5) as pool:
            answers = [pool.submit(chat, url, 12) for _ in range(5)]
            wait_for(lambda: watch() or len(server.engine.waiting) + len(server.engine.sent) == 5)
            server.engine.close(60)  # as after TERM
            wait_for(watch)
        assert [answer.result().status_code for answer in answers] == [200] * 5
        assert most <= 2  # as many rows as --batch-rows allows
        assert not server.engine.thread.is_alive() and not server.engine.sent
    wait_for(lambda: not is_alive(engine))
    assert vllm.process.returncode == 0  # it ends with its standard input, as where the server is killed


def test_a_process_that_cannot_start_is_one_line(merged, tmp_path):
    with pytest.raises(BackendError, match=r"make setup-vllm"):
        VLLM(merged, dtype="float32", rows=2, positions=64, python=tmp_path / "bin" / "python")
    worker = tmp_path / "worker.py"
    worker.write_text("raise ValueError('no room for 64 positions')")
    with pytest.raises(BackendError) as error:
        VLLM(merged, dtype="float32", rows=2, positions=64, python=sys.executable, worker=worker)
    assert str(error.value) == "vLLM did not start: ValueError: no room for 64 positions"


@pytest.mark.long  # vLLM starts in one to two minutes on two cores
@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM's environment is not set up (make setup-vllm)")
def test_vllm_writes_the_tokens_of_our_own_greedy_decoding(tmp_path):
    model = build(tmp_path, llm={"width": 128, "heads": 4})  # heads of 32: vLLM's smallest
    saved = artifact.save(model, tmp_path / "sft" / "model")
    context = context_length(base_of(model.llm).config)
    vllm = VLLM(export_llm(saved, tmp_path / "merged"), dtype="float32", rows=8, positions=context)
    wanted = [(KINDS[number % len(KINDS)], number) for number in range(24)]
    right = {request: expected(model, *request) for request in wanted}
    with serving(without_layers(model), vllm=vllm, batch_rows=8) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(len(wanted)) as pool:
            found = dict(zip(wanted, pool.map(lambda request: ask(client, *request), wanted), strict=True))
    assert json.dumps(sorted(map(str, found.items()))) == json.dumps(sorted(map(str, right.items())))
