"""Text stays text: what data and users write never becomes a tokenizer's control tokens.

A tokenizer takes its added tokens wherever their names stand, in a transcript that quotes `<|im_end|>` as
well as in the chat template. Texts are therefore cut inside such names, behind the first character, and
tokenised piece by piece: no piece holds a whole name. Texts without a name are tokenised as ever.
transformers' `sanitize_control_tokens` has the same purpose; it leaves added tokens alone that the template
does not name, and refuses tokenizers whose model spells a name by itself (Unigram, SentencePiece's own
symbols).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import regex
from transformers import AddedToken, PreTrainedTokenizerBase

_BYTE = r"<0x[0-9A-Fa-f]{2}>"  # names of SentencePiece's byte tokens, which some models spell from text
_WORDS = regex.compile(r"[\p{L}\p{M}\p{N}\s▁]+")
_MARKUP = regex.compile(r"[<\[].+[>\]]")
#: What marks the cuts: noncharacters of Unicode (for use inside a program), then a private-use plane.
_MARKS = (range(0xFDD0, 0xFDF0), range(0x100000, 0x10FFFE))


@dataclass(frozen=True, eq=False)
class ControlTokens:
    """The names that a tokenizer takes for control tokens."""

    begins: regex.Pattern  # matches, without width, wherever a name begins
    special: regex.Pattern  # the same, of special tokens alone
    spelled: regex.Pattern | None  # names of byte tokens, whose ids ordinary text has as well
    ids: frozenset[int]
    beginnings: frozenset[str]  # of names: all proper ones
    ends: frozenset[str]
    longest: int
    rewrites: bool  # the tokenizer may change a text before it looks for names

    def within(self, ids: Iterable[int]) -> list[int]:
        """Return those of the ids that are control tokens, in their order."""
        return [i for i in ids if i in self.ids]

    def threaten(self, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
        """Return whether a text holds a name, or may complete one with the text next to it."""
        if self.begins.search(text) or cuts_at_borders(text, self):
            return True
        return self.rewrites and bool(self.within(tokenizer.encode(text, add_special_tokens=False)))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the control tokens of a tokenizer: its added tokens, but for those of white space (runs of
    blanks, "\\n\\n") and, of those that are not special, plain words that its chat template does not use:
    they are vocabulary."""
    return _control_tokens(tokenizer, len(tokenizer), str(tokenizer.chat_template))


def _is_control(token: AddedToken, template: str) -> bool:
    name = token.content
    if len(name) < 2:  # a single character has no other spelling
        return False
    return token.special or not name.isspace() and (name in template or not _WORDS.fullmatch(name))


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int, template: str) -> ControlTokens:
    added = tokenizer.added_tokens_decoder
    control_ids = {token.content: i for i, token in added.items() if _is_control(token, template)}
    special = [token.content for token in added.values() if token.special and token.content in control_ids]
    if (
        pieces := getattr(tokenizer, "sp_model", None)
    ) is not None:  # symbols that SentencePiece itself keeps whole
        names = (pieces.IdToPiece(i) for i in range(pieces.GetPieceSize()))
        control_ids |= {
            name: tokenizer.convert_tokens_to_ids(name)
            for name in names
            if _MARKUP.fullmatch(name) and pieces.encode(name, out_type=str)[-1:] == [name]
        }
    spelled = regex.compile(_BYTE) if "<0x0A>" in tokenizer.get_vocab() else None
    marks = [*control_ids, *(["<0x0A>"] if spelled else [])]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return ControlTokens(
        begins=_beginning_of(control_ids, spelled),
        special=_beginning_of(special, None),
        spelled=spelled,
        ids=frozenset(control_ids.values()) - {tokenizer.unk_token_id},
        beginnings=frozenset(name[:size] for name in marks for size in range(1, len(name))),
        ends=frozenset(name[size:] for name in marks for size in range(1, len(name))),
        longest=max(map(len, marks), default=0),
        rewrites=backend is None or backend.normalizer is not None,
    )


def _beginning_of(names: Iterable[str], spelled: regex.Pattern | None) -> regex.Pattern:
    any_of = "|".join([*map(regex.escape, names), *([spelled.pattern] if spelled else [])])
    return regex.compile(f"(?={any_of})" if any_of else "(?!)")


def cuts_inside(text: str, names: regex.Pattern) -> set[int]:
    """Return where a text is to be cut: behind the first character of each name."""
    return {match.start() + 1 for match in names.finditer(text)}


def cuts_at_borders(text: str, controls: ControlTokens) -> set[int]:
    """Return where a text is to be cut so that it completes no name with its neighbours: behind the first
    character of a name's beginning at its end, and in front of a name's end at its beginning."""
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    sizes = range(1, min(controls.longest, end - begin + 1))
    return {end - size + 1 for size in sizes if text[end - size : end] in controls.beginnings} | {
        begin for size in sizes if text[begin : begin + size] in controls.ends
    }


def cuts_everywhere(text: str) -> set[int]:
    return set(range(1, len(text)))


def unused_mark(texts: Iterable[str]) -> str:
    """Return a character that none of the texts holds."""
    whole = "".join(texts)
    return next(mark for mark in map(chr, chain(*_MARKS)) if mark not in whole)


def marked(text: str, cuts: set[int], mark: str) -> str:
    """Return the text with a mark at each cut."""
    places = [0, *sorted(cuts), len(text)]
    return mark.join(text[begin:end] for begin, end in itertools.pairwise(places))


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, mark: str, add_special_tokens: bool = False
) -> list[int]:
    """Return the ids of a marked text: its pieces tokenised one by one."""
    first, *others = text.split(mark)
    ids = tokenizer.encode(first, add_special_tokens=add_special_tokens)
    for piece in filter(None, others):
        ids += _continuation(tokenizer, piece)
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    """Return the ids of a piece from the middle of a text: without the space that SentencePiece puts before a
    text's first word."""
    for before in ("a", ".", "\n"):
        context, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (before, before + piece))
        if context and ids[: len(context)] == context:
            return ids[len(context) :]
    return tokenizer.encode(piece, add_special_tokens=False)


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Return the id of a token by its name in the vocabulary; None where there is no such token."""
    number = tokenizer.convert_tokens_to_ids(name)
    return number if isinstance(number, int) and number != tokenizer.unk_token_id else None


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """Return the ids of a text in which nothing is a control token."""
    controls = control_tokens(tokenizer)
    framing = controls.within(tokenizer.encode("", add_special_tokens=True)) if add_special_tokens else []
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens, split_special_tokens=True)
    spelled = controls.spelled is not None and controls.spelled.search(text)
    for cut in (lambda text: cuts_inside(text, controls.begins), cuts_everywhere):
        if controls.within(ids) == framing and not spelled:
            break
        mark = unused_mark([text])
        ids, spelled = encode_pieces(tokenizer, marked(text, cut(text), mark), mark, add_special_tokens), None
    return ids
