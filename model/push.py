"""Upload an exported folder to the Hugging Face Hub: `python -m model.push FOLDER OWNER/NAME`.

    python -m model.export runs/mine/sft --out out/mine --hub-layout
    python -m model.push out/mine my-team/soundwave-mine --dry-run     # needs no network
    python -m model.push out/mine my-team/soundwave-mine --private

The token is that of `hf auth login`, or of the environment variable HF_TOKEN.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from core.command_line import CommandParser
from core.console import OneLine, one_line, print_error, print_text


class PushError(OneLine, ValueError):
    """A folder that cannot be pushed; one line: what, where, what to do."""


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of each file that is uploaded. Errors: PushError for what is no export."""
    if not (folder / "config.json").is_file() or not (folder / "README.md").is_file():
        raise PushError(
            f"{folder} is no export (config.json or README.md is missing): make one with "
            "python -m model.export"
        )
    if not list(folder.glob("*.safetensors")):
        raise PushError(f"{folder} holds no weights (*.safetensors): export again")
    try:
        ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    except Exception as error:  # of YAML, of the card's types
        raise PushError(f"{folder / 'README.md'}: its metadata cannot be read ({one_line(error)})") from None
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink():
            raise PushError(f"{path} is a link: push a folder of plain files")
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            files.append((name.as_posix(), path.stat().st_size))
    return files


def push(folder: Path, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Make the repository if there is none, upload the folder in one commit; return its address. Errors:
    PushError."""
    files = [file for file, _ in files_of(folder)]
    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set: unset it to push, or give --dry-run")
    if not get_token():
        raise PushError("there is no token: hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message or "Upload a Soundwave model",
            allow_patterns=files,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PushError(f"{name} could not be pushed to {constants.ENDPOINT}: {one_line(error)}") from None
    return str(commit.commit_url)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m model.push", __doc__, example="export OWNER/NAME")
    parser.add_argument("folder", type=Path, help="written by python -m model.export")
    parser.add_argument("name", help="OWNER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be uploaded")
    options = parser.parse_args(arguments)
    try:
        try:
            validate_repo_id(options.name)
        except HFValidationError as error:
            raise PushError(f"'{options.name}' is no name on the Hub ({one_line(error)})") from None
        if "/" not in options.name:
            raise PushError(f"'{options.name}' has no owner: give OWNER/NAME")
        if options.dry_run:
            files = files_of(options.folder)
            for name, size in files:
                print_text(f"{size:>15,}  {name}")
            print_text(f"{len(files)} files, {sum(size for _, size in files):,} bytes, to {options.name}")
            return 0
        print_text(push(options.folder, options.name, private=options.private, message=options.message))
    except PushError as error:
        print_error("error:", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
