"""Hotwords: the prefix tree against a search over all choices, the spotter against all paths, the joint search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ctc_text import ctc_target_ids
from model.generation.hotwords import (
    HotwordError,
    Hotwords,
    HotwordTree,
    Progress,
    spellings_of,
    spotting_scores,
)
from model.generation.joint import CTCPrefixScores, JointScores, JointSearch
from tests.model import tiny

WORDS = tiny.tokenizer()
PHRASES = ["the", "a", "at", "the wall", "wall", "law", "'t"]
BONUS = 1.5
TREE = HotwordTree(
    WORDS,
    [
        (spellings, BONUS * min(map(len, spellings)))
        for spellings in (spellings_of(WORDS, phrase) for phrase in PHRASES)
    ],
)


def walk(tokens: list[int]) -> Progress:
    progress = Progress()
    for token in tokens:
        progress = TREE.advance(progress, token)
    return progress


def occurrences(tokens: list[int], whole: bool) -> list[tuple[int, int, float]]:
    """(begin, end, bonus) of every complete phrase in a token sequence that is between borders of words, and,
    in an unfinished sequence, of every phrase that its end begins, with its share."""
    pieces = [WORDS.decode([token]) for token in tokens]

    def border(place: int) -> bool:
        return (
            place == 0
            or place == len(tokens)
            or not (pieces[place - 1][-1].isalnum() and pieces[place][0].isalnum())
        )

    found = []
    for phrase in PHRASES:
        spellings = spellings_of(WORDS, phrase)
        value = BONUS * min(map(len, spellings))
        for spelling in spellings:
            for begin in range(len(tokens)):
                rest = tuple(tokens[begin : begin + len(spelling)])
                if not border(begin):
                    continue
                if rest == spelling and border(begin + len(spelling)):
                    found.append((begin, begin + len(spelling), value))
                elif not whole and len(rest) < len(spelling) and spelling[: len(rest)] == rest:
                    found.append((begin, len(tokens), value * len(rest) / len(spelling)))
    return found


def best_choice(found: list[tuple[int, int, float]]) -> float:
    """The largest sum over phrases that do not overlap, by trying each one last."""
    return max(
        (value + best_choice([other for other in found if other[1] <= begin]) for begin, _, value in found),
        default=0.0,
    )


texts = st.lists(
    st.sampled_from(
        [" the", " wall", " law", "the", "wall", " a", "t", "l", " ", "'", ".", " at", " w", " THE", "Wall"]
    ),
    max_size=7,
).map("".join)


@given(texts)
@settings(max_examples=100, deadline=None)
def test_tree_scores_equal_the_best_choice_of_phrases(text):
    tokens = WORDS.encode(text, add_special_tokens=False)
    progress = walk(tokens)
    assert progress.whole == pytest.approx(best_choice(occurrences(tokens, whole=True)))
    assert progress.begun == pytest.approx(best_choice(occurrences(tokens, whole=False)))


@pytest.mark.parametrize(
    "text, phrases",
    [
        ("the wall", ["the wall"]),
        ("The wall.", ["the wall"]),
        ("walls", []),
        ("a wal", ["a"]),
        ("the walls", ["the"]),
    ],
)
def test_an_unfinished_or_longer_word_keeps_no_bonus(text, phrases):
    tokens = WORDS.encode(text, add_special_tokens=False)
    wanted = sum(BONUS * min(map(len, spellings_of(WORDS, phrase))) for phrase in phrases)
    assert walk(tokens).whole == pytest.approx(wanted)


def test_every_spelling_earns_the_same_bonus():
    for text in (" wall", "wall", " Wall", " WALL"):
        assert walk(WORDS.encode(text, add_special_tokens=False)).whole == pytest.approx(
            BONUS * min(map(len, spellings_of(WORDS, "wall")))
        )


def test_spotting_scores_equal_the_best_of_all_paths():
    frames, size, blank = 5, 4, 3
    log_probs = np.log(np.random.default_rng(0).dirichlet(np.full(size, 0.5), frames))
    behind = log_probs - log_probs.max(axis=1, keepdims=True)
    targets = [[0], [1, 2], [1, 1], [2, 0, 1]]
    wanted = []
    for tokens in targets:
        best = -np.inf
        for begin, end in itertools.combinations(range(frames + 1), 2):
            for path in itertools.product(range(size), repeat=end - begin):
                text = [token for token, _ in itertools.groupby(path) if token != blank]
                if text == tokens and path[0] != blank and path[-1] != blank:
                    best = max(best, sum(behind[begin + t, token] for t, token in enumerate(path)))
        wanted.append(best / len(tokens))
    assert spotting_scores(log_probs, targets, blank) == pytest.approx(wanted)
    assert spotting_scores(log_probs, [], blank).shape == (0,)


def log_probs_of(text: str, doubtful: float = 0.0) -> np.ndarray:
    """Frames that say a text; its last token with another one likelier by `doubtful` nats."""
    said = ctc_target_ids(WORDS, text)
    frames = np.full((2 * len(said) + 1, len(WORDS) + 1), -20.0)
    frames[:, -1] = 0.0
    for place, token in enumerate(said):
        frames[2 * place + 1, -1], frames[2 * place + 1, token] = -20.0, 0.0
    if doubtful:
        frames[2 * len(said) - 1, WORDS.encode("z")[0]] = doubtful
    return frames - np.log(np.exp(frames).sum(axis=1, keepdims=True))


def test_only_phrases_that_the_audio_may_hold_are_favoured():
    hotwords = Hotwords(WORDS, ["law", "wall", "the wall", "quartz", "wall", " "], "lower", margin=4.0)
    assert hotwords.phrases == ["law", "wall", "the wall", "quartz"]
    heard = [hotwords.phrases[i] for i in hotwords.spot(log_probs_of("the wall", 3.0), len(WORDS))]
    assert sorted(heard) == ["the wall", "wall"]
    assert hotwords.tree_for(log_probs_of("ooo"), len(WORDS)) is None


def test_a_list_that_is_a_text_is_refused():
    with pytest.raises(HotwordError, match="give a list"):
        Hotwords(WORDS, "wall")


@pytest.mark.parametrize("bonus, wanted", [(0.0, "waz"), (3.0, "wad")])
def test_joint_search_finds_a_hotword_that_the_llm_does_not_propose(bonus, wanted):
    """The LLM's likeliest tokens spell another word; CTC is in doubt about the last letter."""
    log_probs = log_probs_of(" wad", doubtful=2.0)
    stop = WORDS.eos_token_id
    search = JointSearch(
        weight=1.0, beams=1, candidates=2, token_bonus=0.0, hotwords=Hotwords(WORDS, ["wad"], bonus=bonus)
    )
    processor = JointScores(WORDS, [CTCPrefixScores(log_probs, len(WORDS))], search, [stop], 20)
    proposed = WORDS.encode(" waz", add_special_tokens=False)
    answer: list[int] = []
    for _ in range(len(proposed) + 2):
        scores = torch.full((1, len(WORDS)), -6.0)
        scores[0, proposed[len(answer)] if len(answer) < len(proposed) else stop] = -0.1
        judged = processor(torch.tensor([answer], dtype=torch.long).reshape(1, -1), scores)[0]
        judged[stop] = -torch.inf
        if len(answer) == len(proposed) or not torch.isfinite(judged).any():
            break
        answer.append(int(judged.argmax()))
    assert WORDS.decode(processor.best[0][1]).strip() == wanted


@given(texts)
@settings(max_examples=40, deadline=None)
def test_bonuses_of_a_search_sum_up_to_those_of_the_finished_answer(text):
    tokens = WORDS.encode(text, add_special_tokens=False)
    stop = WORDS.eos_token_id
    log_probs = log_probs_of("the wall a law at")
    totals = []
    for hotwords in (None, Hotwords(WORDS, PHRASES, bonus=BONUS, margin=1e9)):
        search = JointSearch(weight=0.5, beams=1, candidates=len(WORDS), token_bonus=0.0, hotwords=hotwords)
        ctc = CTCPrefixScores(log_probs, len(WORDS))
        processor = JointScores(WORDS, [ctc], search, [stop], 99)
        total = 0.0
        for place, token in enumerate([*tokens, stop]):
            total += processor.judge(0, ctc, tuple(tokens[:place]), [token], [0.0])[0]
        totals.append(total)
    assert totals[1] - totals[0] == pytest.approx(walk(tokens).whole, abs=1e-6)
