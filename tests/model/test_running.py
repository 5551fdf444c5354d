"""Rows that join and leave a running batch get the tokens that they get alone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import GenerationConfig

from model.generation.drafted import Draft, Spelling, refusal
from model.generation.running import Limits, MaskedCache, Row, RunningBatch, sampler
from tests.model import families, tiny

STOP = 2
MOST = 14


def greedy(llm, prompt: torch.Tensor, most: int) -> list[int]:
    """Greedy decoding without cache, padding or batch."""
    answer: list[int] = []
    table = llm.get_input_embeddings()
    while len(answer) < most and answer[-1:] != [STOP]:
        written = table(torch.tensor(answer, dtype=torch.long))
        logits = llm(inputs_embeds=torch.cat([prompt, written])[None], use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def join(batch: RunningBatch, rows: list[Row], prompts: list[torch.Tensor]) -> None:
    longest = max(len(prompt) for prompt in prompts)
    embeddings = torch.zeros(len(rows), longest, prompts[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        embeddings[place, longest - len(prompt) :], mask[place, longest - len(prompt) :] = prompt, 1
    written = batch.join(rows, embeddings, mask)
    assert [row.answer for row in rows] == written


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_rows_that_join_at_any_time_answer_as_alone(family):
    window = {"sliding_window": 34} if family.startswith("gemma") else {}  # closed gaps fit, open ones do not
    llm, dice = families.llm(family, **window), random.Random(5)
    assert refusal(llm, 11 + MOST, 5) is None
    table, spelling = llm.get_input_embeddings(), Spelling(tiny.tokenizer(), [STOP], 128)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        table(torch.randint(3, 128, (dice.randint(1, 11),), generator=generator)).detach() for _ in range(12)
    ]
    most = [dice.randint(1, MOST) for _ in prompts]
    wanted = [greedy(llm, prompt, length) for prompt, length in zip(prompts, most, strict=True)]
    drafts = [None if dice.random() < 0.3 else dice.choice(wanted)[: dice.randint(1, 9)] for _ in prompts]
    rows = [
        Row(Limits([STOP], 0, length), None if draft is None else Draft(spelling, draft, 5))
        for draft, length in zip(drafts, most, strict=True)
    ]
    batch, waiting, together = RunningBatch(llm, -1), list(range(len(rows))), 0
    while waiting or batch.rows:
        if waiting and (not batch.rows or dice.random() < 0.5):
            count = dice.randint(1, 3)
            starting, waiting = waiting[:count], waiting[count:]
            join(batch, [rows[place] for place in starting], [prompts[place] for place in starting])
        added = batch.step()
        assert len(added) == len(batch.rows) and all(tokens for tokens in added)
        together = max(together, len(batch.rows))
    assert [row.answer for row in rows] == wanted and together > 2


@torch.no_grad()
def test_a_row_that_its_caller_ends_leaves_the_others_alone():
    llm = families.llm("llama")
    table = llm.get_input_embeddings()
    prompts = [table(torch.tensor(ids)).detach() for ids in ([5, 9, 11, 40], [7, 8], [90, 3, 4])]
    rows = [Row(Limits([STOP], MOST, MOST)) for _ in prompts]
    batch = RunningBatch(llm, -1)
    join(batch, rows, prompts)
    batch.step()
    rows[1].ended = True
    while batch.step():
        pass
    assert [len(row.answer) for row in rows] == [MOST, 2, MOST]
    alone = Row(Limits([STOP], MOST, MOST))
    join(batch, [alone], prompts[2:])
    while batch.step():
        pass
    assert alone.answer == rows[2].answer


@torch.no_grad()
def test_a_batch_that_cannot_be_joined_stays_as_it_was(monkeypatch):
    llm = families.llm("llama")
    table = llm.get_input_embeddings()
    prompts = [table(torch.tensor(ids)).detach() for ids in ([5, 9, 11, 40], [7, 8])]
    wanted = [greedy(llm, prompt, MOST) for prompt in prompts]
    first, second = (Row(Limits([STOP], 0, MOST)) for _ in prompts)
    batch = RunningBatch(llm, -1)
    join(batch, [first], prompts[:1])

    def no_memory(self, other):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(MaskedCache, "join", no_memory)
        join(batch, [second], prompts[1:])
    assert batch.rows == [first]
    again = Row(Limits([STOP], 0, MOST))
    join(batch, [again], prompts[1:])
    while batch.step():
        pass
    assert [first.answer, again.answer] == wanted


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 0.6)])
@torch.no_grad()
def test_a_row_draws_the_tokens_that_transformers_draws(temperature, top_p):
    llm = families.llm("llama")
    prompt = llm.get_input_embeddings()(torch.tensor([5, 9, 11, 40])).detach()
    settings = GenerationConfig(
        max_new_tokens=MOST,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )
    drawn = []
    for seed in range(5):
        torch.manual_seed(seed)
        wanted = llm.generate(inputs_embeds=prompt[None], generation_config=settings)[0].tolist()
        torch.manual_seed(seed)
        row, batch = Row(Limits([STOP], 0, MOST), choose=sampler(temperature, top_p)), RunningBatch(llm, -1)
        join(batch, [row], [prompt])
        while batch.step():
            pass
        assert row.answer == wanted
        drawn.append(tuple(wanted))
    assert len(set(drawn)) > 1
