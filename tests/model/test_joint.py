"""Joint decoding: CTC's prefix scores against the sum over all paths, and a search that ends where both
models say."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor

from core.ctc_text import ctc_target_ids
from model.generation.joint import CTCPrefixScores, JointScores, JointSearch
from model.language_model import base_of
from model.prompt import stop_ids
from tests.model import tiny
from tests.model.conftest import build
from tests.model.test_generation import conversations


def log_probs(frames: int, size: int, seed: int = 0) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet(np.full(size, 0.5), frames))


def test_prefix_scores_are_sums_over_all_paths():
    frames, size, blank = 6, 4, 3
    lp, texts = log_probs(frames, size), defaultdict(float)
    for path in itertools.product(range(size), repeat=frames):
        text = tuple(token for token, _ in itertools.groupby(path) if token != blank)
        texts[text] += np.exp(sum(lp[t, token] for t, token in enumerate(path)))
    ctc = CTCPrefixScores(lp, blank)
    for tokens in [(0,), (0, 0), (0, 1), (1, 1, 2), (2, 0, 0, 1), (0, 1, 2, 0, 1, 2)]:
        assert np.exp(ctc.whole(tokens)) == pytest.approx(texts[tokens])
        for last in ([tokens[-1]], [0, 2], [0, 1, 2]):
            wanted = sum(
                p
                for text, p in texts.items()
                if text[: len(tokens) - 1] == tokens[:-1]
                and len(text) >= len(tokens)
                and text[len(tokens) - 1] in last
            )
            fresh = CTCPrefixScores(lp, blank)
            assert np.exp(fresh.begun(tokens[:-1], np.array(last), "any of these")) == pytest.approx(wanted)
    assert np.exp(ctc.whole(())) == pytest.approx(texts[()])


def test_what_no_path_can_spell_costs_much_and_stays_a_number():
    ctc = CTCPrefixScores(log_probs(2, 4), 3)
    impossible = ctc.whole((0, 0))  # needs a blank between: three frames
    assert np.isfinite(impossible) and impossible <= -1e4
    assert ctc.begun((0, 1), np.array([2]), "2") == ctc.whole((0, 1, 2)) == impossible


@pytest.mark.parametrize(
    "answer", ["The wall, the ...", "", "I'm a-the\u00a0law!", "the the", "\u5899\u3001\u5899 wall"]
)
@pytest.mark.parametrize("cut", [False, True])
def test_costs_of_an_answer_sum_up_to_ctc_of_its_text(answer, cut):
    """Whichever way a text is cut into tokens, with case and punctuation that CTC does not know, up to a full
    answer."""
    words = tiny.tokenizer()
    lp = log_probs(40, len(words) + 1).astype(np.float32)
    ids = words.encode(answer, add_special_tokens=False)
    stop = [words.eos_token_id]
    search = JointSearch(
        weight=0.7, beams=1, candidates=len(words), token_bonus=1.5, ctc_text="lower_no_punctuation"
    )
    processor = JointScores(
        words, [CTCPrefixScores(lp, len(words))], search, stop, len(ids) if cut else len(ids) + 9
    )
    total, steps = 0.0, ids if cut else [*ids, *stop]
    for place, token in enumerate(steps):
        total += float(
            processor(torch.tensor([steps[:place]], dtype=torch.long), torch.zeros(1, len(words)))[0, token]
        )
    assert total == pytest.approx(score_of(words, lp, answer) if steps else 0.0, rel=1e-4)
    best, found = processor.best[0]  # of those that ended on the way
    assert not steps or best >= total - 1e-3
    assert not steps or best == pytest.approx(score_of(words, lp, words.decode(found)), rel=1e-4)


def score_of(words, lp: np.ndarray, text: str) -> float:
    """Where the LLM finds all alike; log p(text) by torch's own loss."""
    tokens = torch.tensor([ctc_target_ids(words, text, "lower_no_punctuation")], dtype=torch.long)
    loss = torch.nn.functional.ctc_loss(
        torch.from_numpy(lp)[:, None], tokens, [len(lp)], [tokens.shape[1]], blank=len(words), reduction="sum"
    )
    return -0.7 * loss.item() + 1.5 * tokens.shape[1]


def test_a_begun_word_costs_nothing_while_it_may_become_what_was_said():
    """ " t" may still become the token " the", of which CTC is sure, though its own tokens are " " and "t"; "
    s" cannot."""
    words = tiny.tokenizer()
    the = words.encode(" the", add_special_tokens=False)
    assert len(the) == 1
    lp = np.full((5, len(words) + 1), -30.0)
    lp[:, -1], lp[2, -1], lp[2, the[0]] = 0.0, -30.0, 0.0
    search = JointSearch(weight=1.0, beams=1, candidates=len(words), token_bonus=0.0)
    processor = JointScores(words, [CTCPrefixScores(lp, len(words))], search, [words.eos_token_id], 99)
    costs = processor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, len(words)))[0]
    half, wrong = (words.encode(text, add_special_tokens=False)[0] for text in ("t", "s"))
    assert costs[half] == pytest.approx(0.0, abs=1e-3) and costs[wrong] < -20
    assert costs[words.eos_token_id] < -20  # " the" would be left out


@torch.no_grad()
def test_search_follows_ctc_where_it_is_sure_and_the_llm_where_nothing_is_asked(folders):
    model = build(folders)
    batch = conversations(model, [0, 1, 2, 4])  # one audio | none | two | one
    unweighted = JointSearch(weight=0.0, beams=3, candidates=12, token_bonus=0.0)
    for c, answer in zip(
        (0, 1, 2, 4), model.generate(batch, max_new_tokens=6, joint=unweighted), strict=True
    ):
        one = conversations(model, [c])
        plain = beam_search(model, one, 6)
        if c in (1, 2):  # the LLM alone
            assert answer == plain
        assert likelihood(model, one, answer, 6) >= likelihood(model, one, plain, 6) - 1e-4

    silent = model.ctc_head.blank
    said = model.tokenizer.encode(" the wall", add_special_tokens=False)
    letters = [
        text.strip().isascii() and text.strip().isalpha()
        for text in model.tokenizer.batch_decode([[i] for i in range(len(model.tokenizer))])
    ]

    def sure(hidden):
        lp = torch.full((len(hidden), silent + 1), -40.0)
        lp[:, silent] = 0.0
        for place, token in enumerate(said):
            lp[2 * place + 1, silent], lp[2 * place + 1, token] = -40.0, 0.0
        return lp

    def undecided(
        module, inputs, logits
    ):  # all letters alike; what is no text would be free, so it is unlikely
        return 0.01 * logits - 9.0 * ~torch.tensor(letters)[: logits.shape[-1]]

    model.ctc_head.log_probs = sure
    base_of(model.llm).get_output_embeddings().register_forward_hook(undecided)
    joint = JointSearch(weight=50.0, beams=3, candidates=sum(letters))
    found = model.generate(conversations(model, [0, 1]), max_new_tokens=10, joint=joint)
    assert model.tokenizer.decode(found[0], skip_special_tokens=True).lower().split() == ["the", "wall"]
    assert found[1] == beam_search(model, conversations(model, [1]), 10)
    with pytest.raises(ValueError, match="no do_sample"):
        model.generate(batch, do_sample=True, joint=joint)


def beam_search(model, batch, count: int) -> list[int]:
    """transformers' own, of three beams, for one conversation."""
    embeddings, mask, _ = model.embeddings(batch, model.encode_audio(batch), left_padded=True)
    stop = model.tokenizer.eos_token_id
    ids = model.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        num_beams=3,
        length_penalty=0.0,
        eos_token_id=stop,
        pad_token_id=stop,
        repetition_penalty=1.0,
    )[0].tolist()
    return ids[: ids.index(stop)] if stop in ids else ids


def likelihood(model, batch, answer: list[int], count: int) -> float:
    """log p of an answer and its end of turn (unless cut), by one forward."""
    embeddings, _, _ = model.embeddings(batch, model.encode_audio(batch), left_padded=True)
    answer = [*answer, model.tokenizer.eos_token_id][:count]
    words = model.llm.get_input_embeddings()(torch.tensor([answer]))
    logits = (
        model.llm(inputs_embeds=torch.cat([embeddings, words], 1))
        .logits[0, embeddings.shape[1] - 1 : -1]
        .log_softmax(-1)
    )
    return float(logits[range(len(answer)), answer].sum())


def test_a_score_that_the_search_is_not_given_stays_as_it_was():
    words = tiny.tokenizer()
    processor: LogitsProcessor = JointScores(words, [None], JointSearch(beams=2), [words.eos_token_id], 9)
    scores = torch.randn(2, len(words))
    assert torch.equal(processor(torch.tensor([[1], [2]]), scores), scores)


def test_search_waits_for_the_bonus_of_what_is_not_said_yet():
    """After one token the empty answer is ahead: the bonus of those to come is still missing."""
    words = tiny.tokenizer()
    said = words.encode(" the wall", add_special_tokens=False)
    log_probs = np.full((2 * len(said) + 1, len(words) + 1), -20.0)
    log_probs[:, -1] = np.log(0.9)
    for place, token in enumerate(said):
        log_probs[2 * place + 1, -1], log_probs[2 * place + 1, token] = np.log(0.5), np.log(0.5)
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    stop = words.eos_token_id
    search = JointSearch(weight=0.1, beams=1, candidates=2, token_bonus=2.0)
    processor = JointScores(words, [CTCPrefixScores(log_probs, len(words))], search, [stop], 20)
    answer: list[int] = []
    while True:
        scores = torch.full((1, len(words)), -30.0)
        scores[0, said[min(len(answer), len(said) - 1)]] = -6.0 if not answer else -0.1
        scores[0, stop] = -1.5
        judged = processor(torch.tensor([answer], dtype=torch.long).reshape(1, -1), scores)[0]
        going = judged.clone()
        going[stop] = -torch.inf
        if len(answer) == len(said) or not torch.isfinite(going).any():
            break
        answer.append(int(going.argmax()))
    assert answer == said and processor.best[0][1] == said


@torch.no_grad()
def test_one_beam_is_scored_by_probabilities_too(folders):
    """transformers' greedy search hands over logits: a constant added to them is no evidence for longer
    answers."""
    model = build(folders)
    batch = conversations(model, [0, 4])
    joint = JointSearch(weight=0.3, beams=1, candidates=12, token_bonus=1.0)
    plain = model.generate(batch, max_new_tokens=8, joint=joint)
    assert plain == [one_beam(model, conversations(model, [c]), joint, 8) for c in (0, 4)]
    base_of(model.llm).get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits + 50.0
    )
    assert model.generate(batch, max_new_tokens=8, joint=joint) == plain
    for wrong in ({"beams": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="give at least 1"):
            JointSearch(**wrong)


def one_beam(model, batch, joint: JointSearch, count: int) -> list[int]:
    """The search with one beam, written out: the likeliest token of each step, without cache or transformers'
    generate."""
    audio = model.encode_audio(batch)
    embeddings, _, _ = model.embeddings(batch, audio)
    stop, answer = stop_ids(model.tokenizer), []
    scores = JointScores(model.tokenizer, model.ctc_scores(batch, audio), joint, stop, count)
    for _ in range(count):
        logits = model.llm(inputs_embeds=embeddings).logits[:, -1].float()
        token = int(
            scores(torch.tensor([answer], dtype=torch.long).reshape(1, -1), logits.log_softmax(-1)).argmax()
        )
        if token in stop:
            break
        answer.append(token)
        embeddings = torch.cat(
            [embeddings, base_of(model.llm).get_input_embeddings()(torch.tensor([[token]]))], 1
        )
    return scores.best[0][1]
