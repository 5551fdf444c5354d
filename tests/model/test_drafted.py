"""Drafted decoding writes the tokens of greedy decoding, whatever the draft, the model and the batch."""

from __future__ import annotations

import logging
from threading import Thread

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer

from model.generation.drafted import Draft, Drafting, Spelling, refusal
from model.generation.running import Limits, MaskedCache, decode
from model.prompt import stop_ids
from tests.model import families, tiny
from tests.model.conftest import build
from tests.model.test_generation import CONVERSATIONS, conversations

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3_text"]


@pytest.fixture(scope="module")
def models(folders):
    made = {}

    def get(family: str = "llama_tied"):
        if family not in made:
            made[family] = build(folders, family)
        return made[family]

    return get


WORDS = ["the", "wall", "is", "low", "here", "Joe", "joe", "a", "very", "rain", "bow", "rainbow", "but", "we"]


@pytest.fixture(scope="module")
def spelling():
    """Of a byte-level tokenizer that has these words as one token each, with and without a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {character: i for i, character in enumerate(alphabet)}, []
    # Merges with a space come first, so that " wall" is not " " and "wall".
    for spelled in [space + word for space in ("Ġ", "") for word in [*WORDS, *map(str.capitalize, WORDS)]]:
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    backend = Tokenizer(bpe.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    return Spelling(words, [words.eos_token_id], len(words))


def use_drafts(monkeypatch, model, drafts: list[list[int]]) -> None:
    """Let the model check these tokens, exactly as they are."""

    def given(llm, batch, audio, options, stop):
        spelling = Spelling(model.tokenizer, stop, len(model.tokenizer))
        return [Draft(spelling, draft, options.longest) for draft in drafts]

    monkeypatch.setattr(model, "_drafts", given)


# ---- the same tokens ----


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_those_of_greedy_decoding_in_unequal_batches(models, family):
    model = models(family)
    for chosen in ([1], range(len(CONVERSATIONS))):
        batch = conversations(model, chosen)
        greedy = model.generate(batch, max_new_tokens=16)
        for longest in (2, 16):
            assert model.generate(batch, max_new_tokens=16, drafted=Drafting(longest)) == greedy
            assert model.drafted_passes is not None, "fell back to greedy decoding"


DRAFTS = ["right", "damaged", "random", "empty", "long", "repeated", "stop first", "special"]
DRAFTS += ["stop alone", "stop inside", "one token"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_draft_gives_the_same_tokens(models, monkeypatch, family, data):
    model = models(family)
    chosen = data.draw(st.lists(st.integers(0, len(CONVERSATIONS) - 1), min_size=1, max_size=4))
    batch = conversations(model, chosen)
    most, least = data.draw(st.integers(1, 14)), data.draw(st.integers(0, 3))
    options = dict(max_new_tokens=most, min_new_tokens=min(least, most))
    greedy = model.generate(batch, **options)
    stop, token = stop_ids(model.tokenizer), st.integers(0, len(model.tokenizer) - 2)
    drafts = []
    for answer in greedy:
        noise, damaged = data.draw(st.lists(token, max_size=9)), list(answer)
        for one in noise:
            damaged.insert(one % (len(damaged) + 1), one)
        kinds = [answer, damaged, noise, [], (answer + noise) * 6, [*answer, *answer], stop * 2 + answer]
        kinds.append([model.audio_id - 1, *model.tokenizer.all_special_ids, *answer])
        half = len(answer) // 2
        kinds += [stop[:1], [*answer[:half], *stop, *answer[half:]], (answer[:1] or [5]) * 40]
        drafts.append(kinds[data.draw(st.integers(0, len(DRAFTS) - 1))])
    use_drafts(monkeypatch, model, drafts)
    longest = data.draw(st.integers(1, 9))
    assert model.generate(batch, drafted=Drafting(longest), **options) == greedy
    assert model.drafted_passes is not None


@torch.no_grad()
def test_answers_end_at_an_end_of_turn_inside_the_draft(models, monkeypatch):
    """The end of turn is a token that the LLM writes early: rows end at different places, drafts continue."""
    model = models("gemma3_text")
    batch = conversations(model, [0, 2, 3])
    whole = model.generate(batch, max_new_tokens=14)
    ends = stop_ids(model.tokenizer)
    stop = whole[0][3]
    monkeypatch.setattr("model.generation.greedy.end_ids", lambda *_: [*ends, stop])
    for most in (1, 14):
        wanted = [answer[:most] for answer in whole]
        wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in wanted]
        for drafts in (whole, [[stop, *answer] for answer in whole], [[stop]] * len(whole)):
            use_drafts(monkeypatch, model, drafts)
            assert model.generate(batch, max_new_tokens=most, drafted=Drafting(16)) == wanted
            assert model.drafted_passes is not None
    assert len(wanted[0]) <= 3 < max(map(len, wanted))


@torch.no_grad()
def test_gaps_in_the_cache_are_closed_without_a_trace(models, monkeypatch):
    """One answer has a right draft, the other a wrong one: the second row's rejected positions are gaps."""
    model = models("gemma3_text")
    batch = conversations(model, [0, 2])
    greedy = model.generate(batch, max_new_tokens=24, min_new_tokens=24)
    closed = []
    make_room = MaskedCache.make_room

    def always(self, added):
        limit, self.limit = self.limit, 0
        width = self.mask.shape[1]
        make_room(self, added)
        closed.append(width - self.mask.shape[1])
        self.limit = limit

    monkeypatch.setattr(MaskedCache, "make_room", always)
    wrong = [(token + 1) % 256 for token in greedy[1]]
    use_drafts(monkeypatch, model, [greedy[0], wrong])
    assert model.generate(batch, max_new_tokens=24, min_new_tokens=24, drafted=Drafting(5)) == greedy
    assert sum(closed) > 0


@torch.no_grad()
def test_padding_and_gaps_change_no_token_of_many_families():
    """Whatever is not refused gives greedy decoding's tokens, without cache, padding or batch."""
    tokenizer, drafted = tiny.tokenizer(), []
    for family in (
        "llama",
        "mistral",
        "qwen2",
        "phi",
        "phi3",
        "gemma2",
        "gpt_neox",
        "opt",
        "falcon",
        "bloom",
    ):
        llm = families.llm(family)
        if refusal(llm, 40, 4):
            continue
        drafted.append(family)
        generator = torch.Generator().manual_seed(3)
        table = llm.get_input_embeddings()
        rows = [table(torch.randint(3, 128, (length,), generator=generator)) for length in (9, 4)]
        wanted = [_greedy(llm, row, 12) for row in rows]
        embeddings = torch.zeros(2, 9, rows[0].shape[1])
        mask = torch.zeros(2, 9, dtype=torch.long)
        for place, row in enumerate(rows):
            embeddings[place, 9 - len(row) :], mask[place, 9 - len(row) :] = row, 1
        spelling = Spelling(tokenizer, [2], 128)
        drafts = [Draft(spelling, [*wanted[0][:5], 7, *wanted[0][5:]], 4), Draft(spelling, wanted[0], 4)]
        answers, _ = decode(llm, -1, embeddings, mask, drafts, Limits([2], 0, 12))
        assert answers == wanted, family
    assert {"llama", "qwen2", "phi"} <= set(drafted)


def _greedy(llm, prompt: torch.Tensor, count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count and answer[-1:] != [2]:
        written = llm.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
        logits = llm(inputs_embeds=torch.cat([prompt, written])[None], use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


# ---- passes ----


@torch.no_grad()
def test_a_right_draft_takes_one_pass_and_no_draft_one_pass_a_token(models, monkeypatch):
    model = models()
    batch = conversations(model, [0])
    options = dict(max_new_tokens=12, min_new_tokens=12)
    answer = model.generate(batch, **options)[0]
    monkeypatch.setattr("model.generation.drafted._repetition", lambda answer, room: [])
    for draft, passes in ((answer, 1), ([], 12)):
        use_drafts(monkeypatch, model, [draft])
        model.generate(batch, drafted=Drafting(16), **options)
        assert model.drafted_passes.passes == passes


@torch.no_grad()
def test_a_useless_draft_is_given_up(models, monkeypatch):
    model = models()
    batch = conversations(model, [0])
    options = dict(max_new_tokens=40, min_new_tokens=40)
    answer = model.generate(batch, **options)[0]
    monkeypatch.setattr("model.generation.drafted._repetition", lambda answer, room: [])
    unused = [token for token in range(33, 90) if token not in answer]
    use_drafts(monkeypatch, model, [unused * 3])
    model.generate(batch, drafted=Drafting(16), **options)
    assert model.drafted_passes.passes >= 36
    assert model.drafted_passes.drafted < 80, "after 2 x (16 + 8 + 4 + 2 + 1) tokens no draft is tried"


# ---- how the draft follows ----


def follow(spelling: Spelling, draft: str, answer: str) -> list[int]:
    """The numbers of tokens that the LLM has to write by itself, pass by pass, if only the written token is
    known: the length of each accepted run."""
    words = spelling.tokenizer
    wanted = words.encode(answer, add_special_tokens=False)
    aligned = Draft(spelling, words.encode(draft, add_special_tokens=False), 64)
    runs, place = [], 0
    while place < len(wanted):
        proposed = aligned.proposal(wanted[:place], 64)
        left = wanted[place:]
        accepted = next(
            (i for i, (a, b) in enumerate(zip(proposed, left, strict=False)) if a != b),
            min(len(proposed), len(left)),
        )
        runs.append(accepted)
        place += accepted + 1
        if accepted < len(left):
            # The LLM's other choices agree with the draft: they edit nothing.
            choices = [*proposed[:accepted], left[accepted], *proposed[accepted + 1 :], left[accepted]]
            aligned.advance(proposed, accepted, choices[: len(proposed) + 1])
    return runs


@pytest.mark.parametrize(
    ("draft", "answer", "passes"),
    [
        ("the wall is low", "the wall is low", 1),
        ("the wall is low", "the wall, is low", 2),  # punctuation
        ("the wall, is low", "the wall is low", 2),
        ("the wall, is low", "the wall. Is low", 2),  # a capital after the end of a sentence
        ("the joe is low", "the Joe is low", 2),  # case
        ("the wall is very low here", "the wall is low here", 2),  # a word less
        ("the wall is low here", "the wall is very low here", 3),  # a word more, first taken for another word
        ("the wall is low", "the joe is low", 2),  # another word
        ("the rainbow is low", "the rain bow is low", 3),  # one token in the draft, two in the answer
        ("the rain bow is low", "the rainbow is low", 2),
        ("the RAINBOW is low", "the rainbow is low", 2),  # many tokens in the draft, one in the answer
        ("but the wall is very low", "we the wall is very low", 2),
    ],
)
def test_draft_continues_behind_what_the_llm_wrote_by_itself(spelling, draft, answer, passes):
    assert len(follow(spelling, draft, answer)) <= passes


def test_choices_behind_a_mismatch_bring_case_and_punctuation(spelling):
    words = spelling.tokenizer

    def ids(text):
        return words.encode(text, add_special_tokens=False)

    draft = Draft(spelling, ids("but the joe is low"), 16)
    proposed = draft.proposal([], 16)
    # What the LLM writes in place of each draft token, given those in front of it: "Joe" and "," are news.
    choices = [*ids("But"), *ids(" the"), *ids(" Joe"), *ids(","), *ids(" low"), *ids(".")]
    draft.advance(proposed, 0, choices)
    assert words.decode(draft.proposal([], 16)) == " the Joe, is low"


def test_a_draft_is_spelled_as_answers_are(spelling):
    words = spelling.tokenizer
    ctc = words.encode(" the wall joe", add_special_tokens=False)
    stop = words.eos_token_id
    learnt = Spelling(words, [stop], len(words))
    assert words.decode(learnt.draft([*ctc, stop, len(words) + 5])) == "The wall joe.<end>"
    assert learnt.draft([]) == []
    lower, upper, mark = (words.encode(text, add_special_tokens=False)[0] for text in (" joe", " Joe", "!"))
    draft = Draft(learnt, learnt.draft(ctc), 16)
    proposed = draft.proposal([], 16)
    place = proposed.index(lower)
    draft.advance(proposed, place, [*proposed[:place], upper, *proposed[place + 1 :], stop])
    learnt.learn_end([upper, mark, stop])
    assert words.decode(learnt.draft(ctc)) == "The wall Joe!<end>"


def test_a_repetition_in_the_answer_is_drafted(spelling):
    words = spelling.tokenizer
    answer = words.encode("the wall is very very very very", add_special_tokens=False)
    draft = Draft(spelling, [], 8)
    assert draft.proposal(answer, 5) == answer[-1:] * 5
    assert draft.proposal(answer[:-3], 5) == []
    long = words.encode("we is low but we is low", add_special_tokens=False)
    assert draft.proposal(long, 3) == []  # "we" and " we" differ
    again = words.encode(" we is low but we is low", add_special_tokens=False)
    assert words.decode(draft.proposal(again, 6)) == " but we is low but we"


# ---- limits ----


@torch.no_grad()
def test_text_streams_as_in_greedy_decoding(models):
    model = models()
    batch = conversations(model, [0])
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = dict(max_new_tokens=12, streamer=streamer, drafted=Drafting())
    thread = Thread(target=model.generate, args=(batch,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == model.tokenizer.decode(
        model.generate(batch, max_new_tokens=12)[0], skip_special_tokens=True
    )


@pytest.mark.parametrize("family", ["lfm2", "gpt_oss"])
@torch.no_grad()
def test_a_cache_that_cannot_be_cut_falls_back_to_greedy_with_one_line(folders, family, caplog, monkeypatch):
    model = build(folders, family)
    sliding = family == "gpt_oss"
    batch = conversations(model, [0, 4])
    count = 120 if sliding else 6  # with prompt and draft beyond gpt_oss's window of 128
    options = dict(max_new_tokens=count, drafted=Drafting())
    with caplog.at_level(logging.WARNING, "soundwave"):
        if sliding:  # a question of lengths alone
            monkeypatch.setattr(model.llm, "generate", lambda **options: torch.zeros(2, 1, dtype=torch.long))
        answers = [model.generate(batch, **options) for _ in range(2)]
        assert model.drafted_passes is None
    assert sliding or answers[0] == model.generate(batch, max_new_tokens=count)
    lines = [
        record.getMessage() for record in caplog.records if "falls back to greedy" in record.getMessage()
    ]
    assert len(lines) == 1 and ("attends to" if sliding else "cannot be cut") in lines[0]


def test_a_window_that_holds_everything_is_no_window():
    llm = families.llm("mistral")  # a window of 8
    assert "attends to 8 positions" in refusal(llm, 20, 4)
    assert refusal(llm, 2, 4) is None
    assert any(layer.is_sliding for layer in DynamicCache(config=llm.config).layers)


@torch.no_grad()
def test_relaxed_acceptance_takes_the_draft(models, monkeypatch):
    """With a ratio near 0 every token but the end of turn is accepted; with 1 none that is not the best."""
    model = models()
    batch = conversations(model, [0])
    draft = [40, 41, 42, 43, 44, 45, 46, 47]
    use_drafts(monkeypatch, model, [draft])
    loose = model.generate(batch, max_new_tokens=9, drafted=Drafting(16, minimum_ratio=1e-30))
    assert loose[0][:8] == draft
    strict = model.generate(batch, max_new_tokens=9, drafted=Drafting(16))
    assert strict == model.generate(batch, max_new_tokens=9)


def test_wrong_options_are_refused(models):
    model = models()
    batch = conversations(model, [0])
    for wrong in ({"longest": 0}, {"minimum_ratio": 0.0}, {"minimum_ratio": 1.5}):
        with pytest.raises(ValueError, match="give"):
            Drafting(**wrong)
    with pytest.raises(ValueError, match="greedy"):
        model.generate(batch, do_sample=True, drafted=Drafting())
