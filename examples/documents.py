"""Tables that scripts write into documents, between two marks that are comments there."""

from pathlib import Path

from core.files import write_atomically


def put_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between the two marks, each on a line of its own. Errors: ValueError where they are
    missing."""
    whole = path.read_text()
    if [whole.count(mark) for mark in marks] != [1, 1]:
        raise ValueError(f"{path} needs the line {marks[0]} and, below it, the line {marks[1]}, once each")
    head, rest = whole.split(marks[0])
    if marks[1] not in rest:
        raise ValueError(f"{path} has the line {marks[1]} above {marks[0]}: it belongs below")
    write_atomically(path, f"{head}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")
