"""A tiny model behind the real server, in a thread of the test process, on the loopback."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch

from model.soundwave import Soundwave
from tests.model import tiny

QUESTION = "Please transcribe the following audio."


def build(root, parts=("encoder", "adapters", "llm"), llm=None, **alignment) -> Soundwave:
    """llm: sizes of the LLM, as of tests.model.tiny.llm."""
    torch.manual_seed(3)
    encoder = tiny.whisper(root / "whisper")
    language_model = tiny.llm(root / "llm", "llama_tied", **(llm or {}))
    config = tiny.config(encoder, language_model, **alignment)
    made = Soundwave.build(config, parts=parts).eval()
    with torch.no_grad():  # the audio decides the answers
        for name, parameter in made.named_parameters():
            if "lora_B" in name or name.startswith("shrinking.out"):
                parameter.normal_(0, 0.1)
        made.ctc_head.blank_row.normal_(0, 0.2)
        if made.shrinking is not None:
            made.shrinking.norm.weight.fill_(2.0)
    return made


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Soundwave:
    return build(tmp_path_factory.mktemp("served"))


def wav(seconds: float, seed: int = 0, rate: int = 16_000) -> bytes:
    """Noise and a tone, both by the seed."""
    places = np.arange(round(seconds * rate)) / rate
    samples = 0.02 * np.random.default_rng(seed).standard_normal(len(places))
    samples += 0.4 * np.sin(2 * np.pi * (150 + 131 * seed) * places)
    out = io.BytesIO()
    soundfile.write(out, samples.astype(np.float32), rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def part(data: bytes) -> dict:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }


def samples_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="float32")[0])


@contextmanager
def serving(
    model: Soundwave,
    *,
    name: str = "tiny",
    token: str | None = None,
    batching: bool = True,
    vllm=None,
    **limits,
):
    """Yields the server and its address; skips the test without the extra `serve`."""
    for module in ("fastapi", "prometheus_client"):
        pytest.importorskip(module, reason="make setup EXTRAS=serve")
    uvicorn = pytest.importorskip("uvicorn", reason="make setup EXTRAS=serve")

    from serving.app import Server
    from serving.limits import Limits

    made = Server(
        model, name, Limits(**{"new_tokens": 12} | limits), token=token, batching=batching, vllm=vllm
    )
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(made.app, log_config=None, access_log=False, lifespan="on", http="h11", ws="none")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield made, f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as made:
        yield made
