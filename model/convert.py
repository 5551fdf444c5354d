"""Convert the official checkpoint to a model folder, or a model folder back.

python -m model.convert --from-official NAME --out DIR [--encoder WHISPER]   a folder or hub name -> a model
folder of ours
python -m model.convert --to-official RUN/model --out DIR                    and back, LoRA merged

Fine-tune the result: train/recipes/finetune.yaml (docs/fine-tune.md).
"""

from __future__ import annotations

import sys

from core.command_line import CommandParser
from model.artifact import FolderError
from model.official import from_official, to_official
from model.pretrained import SourceError


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(
        "python -m model.convert", __doc__, example="--from-official official --out official/model"
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from-official",
        metavar="NAME",
        help="the official checkpoint: its folder (config, safetensors, tokenizer) or hub name",
    )
    direction.add_argument("--to-official", metavar="DIR", help="model folder of stage 2 or 3")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--encoder",
        metavar="WHISPER",
        help="Whisper's folder or hub name; default: the one inside the "
        "checkpoint, else the one that the official config names",
    )
    options = parser.parse_args(arguments)
    try:
        if options.from_official:
            from_official(options.from_official, options.out, encoder=options.encoder)
            print(f"{options.out}: fine-tune it with train/recipes/finetune.yaml init_from={options.out}")
        else:
            to_official(options.to_official, options.out)
            print(f"{options.out}: the official layout, for the authors' code (transformers 4.43)")
    except (FolderError, SourceError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
