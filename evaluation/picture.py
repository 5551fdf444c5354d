"""Draw one packed clip: spectrogram, blank probability, CTC peaks, compressed frames.

python -m evaluation.picture --model DIR --shards DIR --index 3 --out picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from core.command_line import CommandParser
from data_tools.shards import ShardError, ShardIndex
from model import artifact
from model.picture import draw
from model.pretrained import SourceError
from stream.reader import decode
from stream.rejected import BrokenSample


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m evaluation.picture",
        __doc__.splitlines()[0],
        example="--model runs/me/sft/model --shards shards/test --index 3 --out picture.png",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--shards", required=True, help="folder written by data_tools/pack.py")
    parser.add_argument("--index", type=int, default=0, help="which sample of the folder (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf file")
    options = parser.parse_args(arguments)
    try:
        index = ShardIndex.load(options.shards)
        if not 0 <= options.index < len(index):
            raise ShardError(f"{options.shards} has samples 0 to {len(index) - 1}, not {options.index}")
        audio, sample = index.read(options.index)
        if audio is None:
            raise ShardError(
                f"sample {options.index} of {options.shards} ({sample['id']}) is text only: choose another "
                f"--index"
            )
        model = artifact.load(options.model)
        inspection = model.inspect(
            model.prompts([[{"role": "user", "content": model.config.audio_token}]], [decode(audio)])
        )
    except (BrokenSample, ShardError, SourceError, artifact.FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        draw(
            inspection,
            options.out,
            lambda tokens: str(model.tokenizer.decode(tokens)),
            title=sample.get("text") or sample["id"],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
