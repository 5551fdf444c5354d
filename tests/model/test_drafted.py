"""Drafted decoding writes the tokens of greedy decoding, whatever the draft, the model and the batch."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TextIteratorStreamer

from model.generation import drafted
from model.generation.drafted import Draft, Drafting, Spelling
from model.language_model import base_of, embed
from model.prompt import stop_ids
from tests.model import families, tiny
from tests.model.conftest import build
from tests.model.test_generation import CONVERSATIONS, conversations

FAMILIES = ["llama", "llama_tied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


@pytest.fixture(scope="module")
def models(folders):
    made = {}

    def get(family: str = "llama_tied"):
        if family not in made:
            made[family] = build(folders, family)
        return made[family]

    return get


def use_drafts(monkeypatch, model, drafts: list[list[int]]) -> None:
    """Let the model's CTC head propose these tokens, exactly as they are."""

    def given(batch, audio, options, stop):
        spelling = Spelling(model.tokenizer, stop, len(model.tokenizer))
        return [Draft(spelling, draft, options.longest) for draft in drafts]

    monkeypatch.setattr(model, "_drafts", given)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_those_of_greedy_decoding_in_unequal_batches(models, family):
    model = models(family)
    for chosen in ([0], [1], range(len(CONVERSATIONS)), [4, 2, 2]):
        batch = conversations(model, chosen)
        greedy = model.generate(batch, max_new_tokens=24)
        for longest in (1, 3, 16):
            assert model.generate(batch, max_new_tokens=24, drafted=Drafting(longest)) == greedy
            assert model.drafted_passes is not None, "fell back to greedy decoding"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma3_text"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_draft_gives_the_same_tokens(models, monkeypatch, family, data):
    """Random drafts, parts of the answer with errors, drafts far too long, special and stop ids."""
    model = models(family)
    chosen = data.draw(st.lists(st.integers(0, len(CONVERSATIONS) - 1), min_size=1, max_size=4))
    batch = conversations(model, chosen)
    count, least = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 3))
    greedy = model.generate(batch, max_new_tokens=count, min_new_tokens=min(least, count))
    token = st.integers(0, len(model.tokenizer) - 2)
    drafts = []
    for answer in greedy:
        kind = data.draw(st.sampled_from(["right", "random", "empty", "long", "stop", "damaged"]))
        noise = data.draw(st.lists(token, max_size=12))
        damaged = list(answer)
        for one in noise:
            damaged.insert(one % (len(damaged) + 1), one)
        drafts.append(
            {
                "right": answer,
                "random": noise,
                "empty": [],
                "long": (answer + noise) * 6,
                "stop": stop_ids(model.tokenizer) * 3 + answer,
                "damaged": damaged[len(noise) // 3 :],
            }[kind]
        )
    use_drafts(monkeypatch, model, drafts)
    options = Drafting(data.draw(st.integers(1, 9)))
    written = model.generate(
        batch, max_new_tokens=count, min_new_tokens=min(least, count), drafted=options
    )
    assert model.drafted_passes is not None
    assert written == greedy


@torch.no_grad()
def test_a_right_draft_takes_one_pass_and_no_draft_one_pass_a_token(models, monkeypatch):
    model = models()
    batch = conversations(model, [0])
    answer = model.generate(batch, max_new_tokens=12)[0]
    assert len(answer) == 12
    use_drafts(monkeypatch, model, [answer])
    model.generate(batch, max_new_tokens=12, drafted=Drafting(16))
    assert model.drafted_passes.passes == 1
    use_drafts(monkeypatch, model, [[]])
    model.generate(batch, max_new_tokens=12, drafted=Drafting(16))
    assert model.drafted_passes.passes == 12
