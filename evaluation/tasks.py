"""What each task is scored by, what its reference is, and how a closed-choice answer is read out of free text."""

from __future__ import annotations

import re

from data_tools.languages import language_code, named_language
from data_tools.normalise import plain_label

# One metric family a task; a task that is not named here is scored by what its samples hold (metric_of).
METRICS = {"asr": "wer", "translation": "bleu", "chain": "chain", "emotion": "accuracy", "gender": "accuracy",
           "sound": "accuracy"}

# Other words for a label. A word counts as another label's name first: "calm" is no alias where "calm" is a label.
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
NEGATION = re.compile(rf"(?:(?:\bnot|n't|\bnever)(?:\s+an?)?(?:\s+(?:{ADVERBS}))?|"
                      r"\bno|\brather than|\binstead of|\bneither|\bnor)(?:\s+(?:a|an|the))?\s*$")


def reference_of(sample: dict) -> str:
    """The text that a prediction of this sample is held against: the response, the label, the last answer, the transcript."""
    if sample.get("task") == "asr":
        return sample.get("text") or ""
    turns = [turn["content"] for turn in sample.get("messages") or [] if turn.get("role") == "assistant"]
    return str(sample.get("response") or sample.get("label") or (turns[-1] if turns else None) or sample.get("text") or "")


def metric_of(rows: list[dict]) -> str:
    """wer | bleu | accuracy | chain | answer, for the prediction rows of one task."""
    task = rows[0].get("task") or "asr"
    if all(row.get("choices") for row in rows):
        return "accuracy"
    return METRICS.get(task) or ("accuracy" if all(row.get("label") for row in rows) else "answer")


def target_language(row: dict) -> str | None:
    """Code of a translation's target: of its `target_lang` (a name, or a code), else of the language that its prompt asks for
    ("... into French"); None where neither says."""
    if said := row.get("target_lang"):
        return language_code(said)
    for word in (r"\binto", r"(?<!listen )\bto", r"\bin"):  # "what is said in English, into French"
        for named in re.findall(rf"(?i:{word})\s+((?:[A-Z]\w+\s*){{1,2}})", row.get("prompt") or ""):
            if code := named_language(named.strip()):
                return code
    return None


def lettered_choices(prompt: str | None) -> list[str]:
    """The options of a prompt that lists them as lines "A. ...", "B. ..."; empty where it lists none."""
    options = re.findall(r"^\(?([A-J])[.):]\)?\s+(.+?)\s*$", prompt or "", re.MULTILINE)
    in_order = [letter for letter, _ in options] == list("ABCDEFGHIJ"[:len(options)])
    return [text for _, text in options] if len(options) > 1 and in_order else []


def split_chain(text: str) -> tuple[str | None, str]:
    """Transcript and answer of a "Transcription: ...\\nAnswer: ..." text; (None, text) where it has not that form."""
    match = re.match(r"\s*transcri\w*\s*:\s*(.*?)\s*\banswer\s*:\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    return (match.group(1), match.group(2).strip()) if match else (None, text)


def parse_choice(answer: str, choices: list[str]) -> str | None:
    """The one choice that a free-text answer names, or None when it names none or several.

    Whole words only, case, punctuation and the possessive aside, longer choices first ("not sad" is not "sad"; "female" does not
    hold "male"); a choice after a negation does not count, and a synonym counts where it is not a choice itself.
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
    found = set()
    for name in sorted(names, key=len, reverse=True):
        if not name:
            continue
        for match in re.finditer(rf"(?<=\s){re.escape(name)}(?=\s)", text):
            if not NEGATION.search(text[:match.start()]):
                found.add(names[name])
            # Blank out what was matched, so that a shorter choice inside a longer one is not found again.
            text = text[:match.start()] + "\x00" * (match.end() - match.start()) + text[match.end():]
    return found.pop() if len(found) == 1 else None


def label_among(label: str, choices: list[str]) -> str | None:
    """The choice that a label means: the same words, or the option's letter; None where it means none."""
    for choice in choices:
        if _plain(choice) == _plain(label):
            return choice
    letter = label.strip().upper()
    return choices[ord(letter) - ord("A")] if len(letter) == 1 and letter in "ABCDEFGHIJ"[:len(choices)] else None


def parse_letter(answer: str, choices: list[str]) -> str | None:
    """The choice that an answer to lettered options ("A. ...", "B. ...") gives, by letter, else by its words.

    The article in "A man speaks" is not option A: a letter counts when it stands alone or before . ) : or , with quotes and
    asterisks aside. "Answer: B" and "the answer is B" count first, the last of them: the options may be listed before it.
    """
    letters = "ABCDEFGHIJ"[:len(choices)]
    letter, end, word = f"([{letters}])", r"""[\s*"']*(?:[.):,]|$)""", "(?i:answer|option|choice)"
    verb = "(?:is|would be|must be|should be)"
    said = rf"(?<!wrong )\b{word}(?:\W*:|\W+{verb}\b)\W*(?:{word}\W+)?{letter}(?:{end}|\s+because\b)"
    found = re.findall(said, answer, re.MULTILINE)[-1:]
    for pattern in (rf"^\W*{letter}{end}", rf"\({letter}\)", rf"\\boxed{{{letter}}}", rf"\b{word}\s*\W?{letter}{end}",
                    rf"\b{letter}\s+{verb}\s+(?:the\s+)?(?:correct|right|best|answer)\b",
                    rf"(?i:\bchoose|\bpick|\bselect|\bit's)\s+{letter}{end}"):
        found += re.findall(pattern, answer, re.MULTILINE)
    if small := re.fullmatch(rf"\W*([{letters.lower()}])\W*", answer):
        found = [small[1].upper()]
    return choices[letters.index(found[0])] if found else parse_choice(answer, choices)


def _plain(text: str) -> str:
    """Words alone, as `plain_label` writes a class name ("Dog_bark" is "dog bark"), without quotes and possessive 's."""
    return " ".join(re.sub(r"'s\b|\B'|'\B|[^\w']", " ", plain_label(text).replace("’", "'")).split())
