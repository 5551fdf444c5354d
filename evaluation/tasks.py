"""The reference of a sample, and the choice that a free-text answer to a closed question makes."""

from __future__ import annotations

import re

from core.samples import answer_of, target_language
from data_tools.normalise import plain_label

__all__ = [
    "label_among",
    "lettered_choices",
    "parse_choice",
    "parse_letter",
    "reference_of",
    "same_label",
    "split_chain",
    "target_language",
]

# Other words for a label. A word counts as another label's name first: "calm" is no alias where "calm" is a
# label.
SYNONYMS = [
    {"male", "man", "masculine", "boy"},
    {"female", "woman", "feminine", "girl", "lady"},
    {"happy", "happiness", "joy", "joyful", "cheerful"},
    {"sad", "sadness", "sorrow", "sorrowful"},
    {"angry", "anger", "furious"},
    {"fear", "fearful", "afraid", "scared"},
    {"disgust", "disgusted"},
    {"surprise", "surprised"},
    {"neutral", "unemotional"},
]
ADVERBS = "very|really|so|too|quite|exactly|particularly|especially|at all"  # "not very happy" is not happy
NEGATION = re.compile(
    rf"(?:(?:\bnot|n't|\bnever)(?:\s+an?)?(?:\s+(?:{ADVERBS}))?|"
    r"\bno|\brather than|\binstead of|\bneither|\bnor)(?:\s+(?:a|an|the))?\s*$"
)


def reference_of(sample: dict) -> str:
    """Return the text that a prediction of this sample is scored against; empty where it has no answer."""
    return answer_of(sample) or ""


def lettered_choices(prompt: str | None) -> list[str]:
    """The options of a prompt that lists them as lines "A. ...", "B. ..."; empty where it lists none."""
    options = re.findall(r"^\(?([A-J])[.):]\)?\s+(.+?)\s*$", prompt or "", re.MULTILINE)
    in_order = [letter for letter, _ in options] == list("ABCDEFGHIJ"[: len(options)])
    return [text for _, text in options] if len(options) > 1 and in_order else []


def split_chain(text: str) -> tuple[str | None, str]:
    """Transcript and answer of a "Transcription: ...\\nAnswer: ..." text; (None, text) where it has not that
    form."""
    match = re.match(r"\s*transcri\w*\s*:\s*(.*?)\s*\banswer\s*:\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    return (match.group(1), match.group(2).strip()) if match else (None, text)


def parse_choice(answer: str, choices: list[str]) -> str | None:
    """The one choice that a free-text answer names, or None when it names none or several.

    Whole words only, case, punctuation and the possessive aside, longer choices first ("not sad" is not
    "sad"; "female" does not hold "male"); a choice after a negation does not count, and a synonym counts
    where it is not a choice itself.
    """
    text = f" {_plain(answer)} "
    names: dict[str, str] = {}
    for choice in choices:
        names[_plain(choice)] = choice
    for choice in choices:
        for group in SYNONYMS:
            if _plain(choice) in group:
                for word in group:
                    names.setdefault(word, choice)
    named = set()
    for name in sorted(names, key=len, reverse=True):
        if not name:
            continue
        for match in re.finditer(rf"(?<=\s){re.escape(name)}(?=\s)", text):
            if not NEGATION.search(text[: match.start()]):
                named.add(names[name])
            # Blank out what was matched, so that a shorter choice inside a longer one is not found again.
            text = text[: match.start()] + "\x00" * (match.end() - match.start()) + text[match.end() :]
    return named.pop() if len(named) == 1 else None


def same_label(first: str, second: str) -> bool:
    """Return whether two labels are the same words: "Dog_bark" is "dog bark"."""
    return _plain(first) == _plain(second)


def label_among(label: str, choices: list[str]) -> str | None:
    """The choice that a label means: the same words, or the option's letter; None where it means none."""
    for choice in choices:
        if same_label(choice, label):
            return choice
    letter = label.strip().upper()
    return (
        choices[ord(letter) - ord("A")] if len(letter) == 1 and letter in _LETTERS[: len(choices)] else None
    )


_LETTERS = "ABCDEFGHIJ"
_AND = r"(?:\s*[,;/&+]\s*(?:(?i:and|or)\s+)?|\s+(?i:and|or|nor)\s+)"  # between two letters: "A, B", "A or B"
_CONCLUSION = (
    r"(?i:\bchoose|\bpick|\bselect|\bgo with|\bit's|\bit is|\bso|\btherefore|\bthus|\bhence|\bmust be|\bbut)"
)
_VERB = r"(?i:is|would be|must be|should be|has to be)"
# A letter is denied where one of these precedes or follows it.
_DENIED_BEFORE = re.compile(
    r"(?i:\bnot|n't|\bnever|\bneither|\bnor|\brather than|\binstead of|\bexcept|\bexclude|\brule out"
    r"|\bruled out|\b(?:wrong|incorrect|false)\s+(?:answer|option|choice)(?:\s+is)?)"
    r"(?i:\s+(?:option|choice|answer))?\W*$"
)
_DENIED_VERB = re.compile(r"(?i:\bnot|n't|\bnever)\s*$")  # "I would not choose B"
_DENIED_AFTER = re.compile(
    r"""^["'*)\]]*\s+(?i:(?:is|was|are|were|would be|seems)\s*(?:not|n't|wrong|incorrect"""
    r"""|false|impossible|ruled out|excluded)|cannot|can't|couldn't|mustn't)\b"""
)


def parse_letter(answer: str, choices: list[str]) -> str | None:
    """The one choice that an answer to lettered options ("A. ...", "B. ...") gives, by letter, else by its
    words; None where it gives none or several.

    A repeated list of the options is no answer. Statements count in this order, each kind only where the ones
    before say nothing: a named answer ("Answer: B", "the answer is B"; the last one), a conclusion ("I choose
    B", "so B", "B is correct"; the last one), a letter at the beginning of a line, one in brackets or after
    "option". Denied letters ("not B", "B is wrong") do not count, and a statement of several letters ("A, B",
    "A or B") gives none. The article in "A man speaks" is not option A: a letter counts when it is isolated
    or before . ) : or , with quotes and asterisks aside.
    """
    statement = _without_listing(answer, choices)
    letters = _LETTERS[: len(choices)]
    if small := re.fullmatch(rf"\W*([{letters.lower()}])\W*", statement):
        return choices[letters.index(small[1].upper())]
    one = rf"[(\[\"'*{{]*([{letters}])"
    end, word = (
        r"""(?=[\s*"']*(?:[.)\]}:,;!?/&]|$)|[\s*"']+(?:and|or|but|because|since|as)\b)""",
        "(?i:answer|option|choice)",
    )
    kinds = (
        (rf"\b{word}(?:\s*\W*:|\W+{_VERB})\W*(?:{word}\W+)?{one}{end}",),
        (
            rf"{_CONCLUSION}\W+(?:{word}\W+)?{one}{end}",
            rf"(?<![\w(])\(?({'[' + letters + ']'})\)?\s+{_VERB}\s+(?:the\s+)?(?i:correct|right|best|answer)\b",  # noqa: E501
        ),
        (rf"(?:^|[.!?]\s)\W*{one}{end}",),
        (rf"\(([{letters}])\)", rf"\\boxed{{([{letters}])}}", rf"\b{word}\s*\W?{one}(?![\w'])"),
    )
    for number, patterns in enumerate(kinds):
        matches = sorted(
            (match for pattern in patterns for match in re.finditer(pattern, statement, re.MULTILINE)),
            key=lambda match: match.end(1),
        )
        given = [
            _letters_from(match, statement, letters)
            for match in matches
            if not _DENIED_BEFORE.search(statement[: match.start(1)])
            and not _DENIED_VERB.search(statement[: match.start()])
            and not _DENIED_AFTER.search(statement[match.end(1) :])
        ]
        if given:
            distinct = given[-1] if number < 2 else set().union(*given)
            return choices[letters.index(min(distinct))] if len(distinct) == 1 else None
    return parse_choice(statement, choices)


def _without_listing(answer: str, choices: list[str]) -> str:
    """The answer without the options where it repeats several options with their letters."""

    def option(letter: str, choice: str) -> str:
        spelled = r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", choice)))
        return rf"(?<![\w'])[(\[\"'*]*{letter}[.):\]\"'*]+\s*(?i:{spelled})(?!\w)[.,;]?"

    options = [
        option(letter, choice)
        for letter, choice in zip(_LETTERS, choices, strict=False)
        if re.search(r"[^\W_]", choice)
    ]
    if sum(re.search(pattern, answer) is not None for pattern in options) < 2:
        return answer
    return re.sub("|".join(options), "\n", answer)


def _letters_from(match: re.Match, text: str, letters: str) -> set[str]:
    """The letter of a statement, and those that stand with it in a row."""
    following = re.match(rf"(?:[)\]\"'*]*{_AND}[(\[\"'*]*[{letters}](?![\w']))*", text[match.end(1) :])
    return {match[1], *re.findall(rf"[{letters}]", following[0] if following else "")}


def _plain(text: str) -> str:
    """Words alone, as `plain_label` writes a class name ("Dog_bark" is "dog bark"), without quotes and
    possessive 's."""
    return " ".join(re.sub(r"'s\b|\B'|'\B|[^\w']", " ", plain_label(text).replace("’", "'")).split())
