"""Many requests at once: each gets its own answer, whatever else the batch holds."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.samples import asked
from tests.serving.conftest import QUESTION, part, samples_of, serving, wav

openai = pytest.importorskip("openai")


def ask(client, kind: str, number: int):
    """Returns the text, or the status of what was refused."""
    clip = wav(0.3 + 0.07 * number, number)
    try:
        if kind == "transcription":
            return client.audio.transcriptions.create(model="tiny", file=("c.wav", clip)).text
        if kind == "streamed":
            events = client.audio.transcriptions.create(model="tiny", file=("c.wav", clip), stream=True)
            return list(events)[-1].text.strip()
        if kind == "chat":
            content = [part(clip), {"type": "text", "text": f"Number {number}?"}]
            found = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=3 + number % 9
            )
            return found.choices[0].message.content
        if kind == "text":
            messages = [{"role": "user", "content": f"Number {number}?"}]
            return client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
        if kind == "bad audio":
            return client.audio.transcriptions.create(model="tiny", file=("c.wav", clip[:20])).text
        if kind == "bad model":
            return client.audio.transcriptions.create(model="other", file=("c.wav", clip)).text
        if kind == "too long for the context":
            messages = [{"role": "user", "content": "x " * 4_000}]
            return client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
    except openai.APIStatusError as error:
        return error.status_code
    raise ValueError(kind)


def expected(model, kind: str, number: int):
    if kind in ("transcription", "streamed", "chat"):
        question, tokens = (f"Number {number}?", 3 + number % 9) if kind == "chat" else (QUESTION, 12)
        clip = samples_of(wav(0.3 + 0.07 * number, number))
        text = model.answer([[asked(question)]], [clip], max_new_tokens=tokens)[0]
        return text if kind == "chat" else " ".join(text.split())
    if kind == "text":
        chat = [{"role": "user", "content": f"Number {number}?"}]
        return model.answer([chat], max_new_tokens=12)[0]
    return 404 if kind == "bad model" else 400


KINDS = 4 * ["transcription"] + 2 * ["streamed", "chat"] + ["text", "bad audio", "bad model"]
KINDS += ["too long for the context"]


@pytest.mark.parametrize("batching", [True, False])
def test_fifty_requests_at_once_get_the_offline_answers(model, batching):
    wanted = [(KINDS[number % len(KINDS)], number) for number in range(50 if batching else 15)]
    right = {request: expected(model, *request) for request in wanted}
    assert len({value for value in right.values()}) > (15 if batching else 5)  # mixed answers would be seen
    random.Random(0).shuffle(wanted)
    with serving(model, batching=batching, batch_wait=0.05) as (server, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(len(wanted)) as pool:
            found = dict(zip(wanted, pool.map(lambda request: ask(client, *request), wanted), strict=False))
        sizes = server.metrics.batch_rows._sum.get()
        batches = sum(bucket.get() for bucket in server.metrics.batch_rows._buckets)
    assert found == right
    assert (sizes / batches > 2) if batching else (sizes == batches)
