"""docs/troubleshooting.md quotes messages that the code really prints."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def messages() -> list[str]:
    """Every string of the code, with `...` for what is filled in; implicit concatenations are one string."""
    found = []
    for room in (
        "core",
        "model",
        "recipe",
        "stream",
        "train",
        "data_tools",
        "soundwave",
        "evaluation",
        "serving",
        "examples",
        "install",
    ):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[-0-9.]*[sdfg]", "...", node.value))
    return found


def test_every_quoted_message_is_in_the_code():
    known, missing, count = messages(), [], 0
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        for quoted in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            if "fetch" in quoted:
                continue
            count += 1
            pieces = [
                piece.strip().replace('\\"', '"') for piece in quoted.split("...") if len(piece.strip()) > 3
            ]
            if not any(all(piece in message for piece in pieces) for message in known):
                missing.append(quoted)
    assert count > 70 and missing == []
