"""Generation: batches of unequal audio and prompts give what each conversation gives alone, and what a plain
loop gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from threading import Thread

import pytest
import torch
from transformers import AutoConfig, TextIteratorStreamer

from model.language_model import base_of, context_length
from model.pretrained import SourceError
from model.prompt import stop_ids
from model.waveforms import SoundWarning
from tests.model import tiny
from tests.model.conftest import build
from tests.model.tiny import chat

CONVERSATIONS = [  # (chat, seconds of each of its audios)
    (chat("What is said?"), [1.1]),
    (chat("2 + 2 = ?", audio=False), []),
    ([{"role": "user", "content": "First <audio_patch>, then <audio_patch>: the same?"}], [0.3, 0.7]),
    (
        [
            {"role": "system", "content": "Be brief."},
            *chat("Hm?", "the wall"),
            {"role": "user", "content": "And <audio_patch>"},
        ],
        [0.05, 0.4],
    ),
    (chat("?"), [0.02]),
]


def conversations(model, chosen, **options):
    """A batch of some of CONVERSATIONS; each audio is the same whatever else is in the batch."""
    sounds = [
        torch.randn(round(s * 16000), generator=torch.Generator().manual_seed(10 * c + i)) * 0.1
        for c in chosen
        for i, s in enumerate(CONVERSATIONS[c][1])
    ]
    return tiny.batch_of(
        model, [CONVERSATIONS[c][0] for c in chosen], sounds, [None] * len(sounds), **options
    )


def plain_loop(model, batch, count: int) -> list[int]:
    """Greedy decoding of one conversation without cache, padding or transformers' generate."""
    audio = model.encode_audio(batch)
    embeddings, _, _ = model.embeddings(batch, audio)
    stop, answer = stop_ids(model.tokenizer, model.config.prompt), []
    for _ in range(count):
        token = int(model.llm(inputs_embeds=embeddings).logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        embeddings = torch.cat(
            [embeddings, base_of(model.llm).get_input_embeddings()(torch.tensor([[token]]))], 1
        )
    return answer


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma3_text"])
@torch.no_grad()
def test_batch_equals_each_alone_equals_a_plain_loop(folders, family):
    model = build(folders, family)
    alone = [plain_loop(model, conversations(model, [c]), 12) for c in range(len(CONVERSATIONS))]
    assert len({tuple(a) for a in alone}) > 1, "the conversations must tell something apart"
    for left in (False, True):
        together = model.generate(
            conversations(model, range(len(CONVERSATIONS)), left=left), max_new_tokens=12
        )
        assert together == alone
    assert model.generate(conversations(model, [3, 0, 1]), max_new_tokens=12) == [
        alone[3],
        alone[0],
        alone[1],
    ]
    assert [
        model.generate(conversations(model, [c]), max_new_tokens=12)[0] for c in range(len(CONVERSATIONS))
    ] == alone


@torch.no_grad()
def test_text_only_batch(folders):
    model = build(folders)
    assert (
        model.generate(conversations(model, [1, 1]), max_new_tokens=6)
        == [plain_loop(model, conversations(model, [1]), 6)] * 2
    )


@torch.no_grad()
def test_end_of_turn_ends_an_answer(folders):
    """A row that ends early is cut there; the others continue."""
    model = build(folders)
    batch = conversations(model, [0, 4])
    free = model.generate(batch, max_new_tokens=12)
    cut = free[0][3]
    end = free[0].index(cut)
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(cut)
    after = model.generate(batch, max_new_tokens=12)
    assert after[0] == free[0][:end]
    assert after[1] == (free[1][: free[1].index(cut)] if cut in free[1] else free[1])


@torch.no_grad()
def test_text_streams_as_it_is_made(folders):
    model = build(folders)
    batch = conversations(model, [0])
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=model.generate, args=(batch,), kwargs=dict(max_new_tokens=12, streamer=streamer))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == model.tokenizer.decode(
        model.generate(batch, max_new_tokens=12)[0], skip_special_tokens=True
    )


@torch.no_grad()
def test_sampling_keeps_to_the_likeliest_tokens(folders):
    """The authors' temperature 0.2 and top_p 0.9: every drawn token lies within the nucleus, and draws
    differ by seed."""
    model = build(folders)
    batch = conversations(model, [0] * 16)
    torch.manual_seed(3)
    drawn = model.generate(batch, max_new_tokens=1, do_sample=True, temperature=3.0, top_p=0.9)
    embeddings, _, _ = model.embeddings(one := conversations(model, [0]), model.encode_audio(one))
    probabilities = (
        (model.llm(inputs_embeds=embeddings).logits[0, -1] / 3.0).softmax(-1).sort(descending=True)
    )
    inside = probabilities.indices[: int((probabilities.values.cumsum(0) < 0.9).sum()) + 1].tolist()
    tokens = {row[0] for row in drawn if row}
    assert len(tokens) > 1 and tokens <= set(inside)
    cold = model.generate(batch, max_new_tokens=1, do_sample=True, temperature=1e-4, top_p=0.9)
    assert cold == model.generate(batch, max_new_tokens=1)


@torch.no_grad()
def test_transcript_of_the_ctc_head(folders):
    model = build(folders)
    batch = conversations(model, [0, 2])
    texts = model.ctc_greedy(batch)
    features, frames = model.encoder(batch.waveforms, batch.audio_lengths)
    hidden, lengths = model.alignment(features, frames)
    table = torch.cat([model.ctc_head.weight, model.ctc_head.blank_row[None]])
    for row in range(3):
        best = (hidden[row, : lengths[row]] @ table.T).argmax(-1).tolist()
        tokens = [t for i, t in enumerate(best) if t != len(table) - 1 and (i == 0 or t != best[i - 1])]
        assert texts[row] == model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert any(texts)
    assert [r.tolist() for r in model.lengths_of_last_batch][0] == lengths.tolist()


@torch.no_grad()
def test_inspection_returns_intermediate_outputs(folders):
    model = build(folders)
    batch = conversations(model, [0, 2])
    seen, audio = model.inspect(batch), model.encode_audio(batch)
    assert seen["frame_rate"] == 25.0 and seen["blank"] == model.ctc_head.blank
    for row, length in enumerate(audio.lengths.tolist()):
        assert abs(seen["seconds"][row] - batch.audio_lengths[row].item() / 16000) < 0.06
        assert seen["mel"][row].shape == (80, -(-int(batch.audio_lengths[row]) // 160))
        assert torch.equal(seen["tokens"][row], audio.argmax[row, :length])
        assert seen["blank_probability"][row].shape == seen["peak"][row].shape == (length,)
        is_blank = seen["tokens"][row] == seen["blank"]
        torch.testing.assert_close(
            seen["blank_probability"][row][is_blank], seen["peak"][row][is_blank].exp()
        )
        assert seen["kept"][row].tolist() == audio.kept[row, : audio.kept_lengths[row]].tolist()
    features, frames = model.encode(batch)
    cached = model.inspect(replace(batch, waveforms=None, features=features, audio_lengths=frames))
    assert cached["mel"][0] is None and torch.equal(cached["kept"][1], seen["kept"][1])


def test_generation_needs_the_llm_and_leaves_the_mode_alone(folders):
    first = build(folders, parts=("encoder", "adapters"))
    with pytest.raises(ValueError, match="use ctc_greedy"):
        first.generate(conversations(first, [0]))
    model = build(folders).train()
    modes = {name: m.training for name, m in model.named_modules()}
    model.generate(conversations(model, [0]), max_new_tokens=1)
    model.ctc_greedy(conversations(model, [0]))
    assert modes == {name: m.training for name, m in model.named_modules()}


@torch.no_grad()
def test_of_the_base_s_generation_settings_only_the_ends_count(folders, tmp_path):
    """What others tuned for the base (n-grams, suppressed words, a time limit, sampling) is not what was
    asked for."""
    plain = build(folders)
    batch = conversations(plain, [0, 1, 4])
    wanted = plain.generate(batch, max_new_tokens=12)
    base = tmp_path / "llm"
    shutil.copytree(folders("llama_tied"), base)
    file = base / "generation_config.json"
    settings = json.loads(file.read_text())
    likely = wanted[0][0]
    tuning = {
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [likely],
        "bad_words_ids": [[likely]],
        "repetition_penalty": 5.0,
        "max_time": 1e-9,
        "min_length": 5,
        "forced_eos_token_id": wanted[0][1],
        "begin_suppress_tokens": [likely],
        "do_sample": True,
        "temperature": 9.0,
        "top_k": 3,
        "top_p": 0.5,
        "sequence_bias": [[[likely], -99.0]],
    }
    file.write_text(json.dumps(settings | tuning))
    assert tuned(folders, str(base)).generate(batch, max_new_tokens=12) == wanted
    file.write_text(json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], wanted[0][3]]}))
    ended = tuned(folders, str(base)).generate(batch, max_new_tokens=12)
    assert ended[0] == wanted[0][: wanted[0].index(wanted[0][3])]
    torch.manual_seed(0)
    drawn = plain.generate(batch, max_new_tokens=12, do_sample=True, temperature=2.0, top_p=1.0)
    file.write_text(json.dumps(settings | {"top_k": 2, "min_p": 0.9, "typical_p": 0.1}))
    model = tuned(folders, str(base))
    torch.manual_seed(0)
    assert model.generate(batch, max_new_tokens=12, do_sample=True, temperature=2.0, top_p=1.0) == drawn
    file.write_text("{")
    with pytest.raises(SourceError, match="generation_config.json cannot be read"):
        tuned(folders, str(base))


def tuned(folders, base: str):
    """`build`'s model on another folder of the same LLM."""
    return build(lambda name, **options: folders(name, **options) if name == "whisper" else base)


@torch.no_grad()
def test_a_conversation_beyond_the_llm_s_context_is_named(folders):
    model = build(folders)
    whole = model.generate(conversations(model, [0, 4]), max_new_tokens=6)
    longest = max(
        model.embeddings(one := conversations(model, [c]), model.encode_audio(one))[1].sum().item()
        for c in (0, 4)
    )
    base_of(model.llm).config.max_position_embeddings = longest + 3
    with pytest.warns(
        SoundWarning, match=f"end after 3 tokens: the LLM's context of {longest + 3} positions"
    ):
        assert model.generate(conversations(model, [0, 4]), max_new_tokens=6) == [
            answer[:3] for answer in whole
        ]
    base_of(model.llm).config.max_position_embeddings = longest
    with pytest.warns(
        SoundWarning, match=f"conversation 0 takes {longest} positions.* the LLM's context has {longest}"
    ):
        answers = model.generate(conversations(model, [0, 4]), max_new_tokens=2)
    assert answers == [[], whole[1][:2]] and list(model.unanswered) == [0]
    with pytest.raises(ValueError, match="conversation 0 takes"), pytest.warns(SoundWarning):
        model.answer([CONVERSATIONS[0][0]], [torch.zeros(round(16000 * CONVERSATIONS[0][1][0]))])
    base_of(model.llm).config.max_position_embeddings = longest + 6
    assert model.generate(conversations(model, [0, 4]), max_new_tokens=6) == whole and not model.unanswered


@pytest.mark.parametrize(
    ("sizes", "context"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"n_positions": 64, "model_type": "gpt2"}, 64),
        ({"model_type": "bloom"}, None),
        (
            {
                "max_position_embeddings": 100,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 100,
                },
            },
            400,
        ),
    ],
)
def test_context_of_a_configuration(sizes, context):
    sizes = dict(sizes)
    assert context_length(AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes)) == context
