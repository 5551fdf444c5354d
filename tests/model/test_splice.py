"""Audio in the place of its tokens, against lists put together row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.language_model import splice

AUDIO, WIDTH = 7, 3


@st.composite
def batches(draw):
    """Rows of tokens (some are audio), and so many frames for each audio."""
    rows = draw(
        st.lists(st.lists(st.sampled_from([1, 2, 3, AUDIO]), min_size=1, max_size=6), min_size=1, max_size=4)
    )
    audios = sum(row.count(AUDIO) for row in rows)
    return (
        rows,
        draw(st.lists(st.integers(1, 4), min_size=audios, max_size=audios)),
        draw(st.integers(0, 3)),
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans())
def test_rows_equal_a_plain_concatenation(batch, with_labels):
    rows, lengths, spare, left = batch
    longest, kept = max(map(len, rows)), max(lengths, default=0) + spare
    ids, mask = torch.full((len(rows), longest), 1), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        at = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, at], mask[row, at] = torch.tensor(tokens), 1
    text = torch.arange(ids.numel() * WIDTH, dtype=torch.float32).view(*ids.shape, WIDTH)
    audio = -1 - torch.arange(len(lengths) * kept * WIDTH, dtype=torch.float32).view(
        len(lengths), kept, WIDTH
    )
    labels = ids * 10 if with_labels else None
    embeddings, new_mask, new_labels = splice(
        text, ids, mask, labels, audio, torch.tensor(lengths, dtype=torch.long), AUDIO, left_padded=left
    )
    expected, number = [], 0
    for row in range(len(rows)):
        parts = []  # (vector, label)
        for column in range(longest):
            if not mask[row, column]:
                continue
            if ids[row, column] == AUDIO:
                parts += [(audio[number, k], -100) for k in range(lengths[number])]
                number += 1
            else:
                parts.append((text[row, column], int(labels[row, column]) if with_labels else -100))
        expected.append(parts)
    width = max(map(len, expected))
    assert embeddings.shape == (len(rows), width, WIDTH) and new_mask.shape == new_labels.shape == (
        len(rows),
        width,
    )
    for row, parts in enumerate(expected):
        own = slice(width - len(parts), None) if left else slice(0, len(parts))
        assert torch.equal(embeddings[row, own], torch.stack([vector for vector, _ in parts]))
        assert new_labels[row, own].tolist() == [label for _, label in parts]
        assert new_mask[row].sum() == len(parts) and new_mask[row, own].all()
        padding = new_mask[row] == 0
        assert not embeddings[row][padding].any() and (new_labels[row][padding] == -100).all()


def test_gradients_reach_audio_and_text_and_no_padding():
    ids = torch.tensor([[1, AUDIO, 2], [AUDIO, 1, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    text, audio = torch.randn(2, 3, WIDTH, requires_grad=True), torch.randn(2, 4, WIDTH, requires_grad=True)
    embeddings, _, _ = splice(text, ids, mask, None, audio, torch.tensor([2, 3]), AUDIO)
    embeddings.sum().backward()
    assert text.grad[..., 0].tolist() == [[1, 0, 1], [0, 1, 0]] and audio.grad[..., 0].tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]


def test_audio_takes_the_type_of_the_text():
    ids = torch.tensor([[1, AUDIO]])
    embeddings, *_ = splice(
        torch.ones(1, 2, WIDTH, dtype=torch.bfloat16),
        ids,
        torch.ones_like(ids),
        None,
        torch.full((1, 1, WIDTH), 2.0),
        torch.tensor([1]),
        AUDIO,
    )
    assert embeddings.dtype == torch.bfloat16 and embeddings[0, :, 0].tolist() == [1, 2]


@pytest.mark.parametrize("left", [False, True])
def test_rows_without_audio_only_lose_padding(left):
    ids, mask = torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    text = torch.randn(2, 3, WIDTH)
    embeddings, new_mask, labels = splice(
        text,
        ids,
        mask,
        ids,
        torch.zeros(0, 5, WIDTH),
        torch.zeros(0, dtype=torch.long),
        AUDIO,
        left_padded=left,
    )
    assert embeddings.shape[1] == 2 and torch.equal(new_mask, mask[:, 1:] if left else mask[:, :2])
    assert torch.equal(embeddings[new_mask.bool()], text[mask.bool()])
    assert torch.equal(labels[new_mask.bool()], ids[mask.bool()])
