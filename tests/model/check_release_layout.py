"""Does the transformers version of the authors' code take a folder that `model.convert --to-official` wrote?

    python -m tests.model.check_release_layout DIR [--venv VENV]

makes a virtual environment with transformers 4.43.1 (once; torch and safetensors are those of this one), and
in it loads DIR strictly into a class written from docs/method.md (release.py), its tokenizer too. If DIR
holds `expected.safetensors` (input_ids [L], mel [n_mels, 3000], logits [L', V], text_ids of a sentence),
answers are compared, too. Exit code 0 when all holds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS = "transformers==4.43.1"
NUMPY = "numpy==1.26.4"  # the newest that it takes
TEXT = "What does the wall say?"
TOLERANCE = 1e-4


def environment(folder: Path) -> Path:
    """The interpreter of the old environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"{folder}: installing {TRANSFORMERS}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRANSFORMERS, NUMPY], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "zz_borrowed.pth").write_text(
            sysconfig.get_path("purelib") + "\n"
        )  # last on the path: only what is missing
        (folder / "ready").touch()
    return python


def inside(folder: Path) -> None:
    """What runs under transformers 4.43."""
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from tests.model.release import ReleasedSoundwave

    assert transformers.__version__ == TRANSFORMERS.split("==")[1], transformers.__version__
    model = ReleasedSoundwave.load(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert words.convert_tokens_to_ids("<audio_patch>") == model.config["audio_patch_token"]
    assert words.pad_token_id == model.config["llm_pad_token_id"]
    print(
        f"transformers {transformers.__version__}: {len(model.state_dict())} tensors loaded strictly, "
        f"<audio_patch> is {model.config['audio_patch_token']} of {model.config['vocab_size']}"
    )
    if (folder / "expected.safetensors").exists():
        expected = load_file(folder / "expected.safetensors")
        assert words(TEXT).input_ids == expected["text_ids"].tolist(), "the tokenizer gives other ids"
        logits = model.logits(expected["input_ids"], expected["mel"])
        # The rows that the table was given for <audio_patch> and padding follow the LLM's own.
        difference = (logits[:, : expected["logits"].shape[1]] - expected["logits"]).abs().max()
        print(f"largest difference of a logit: {difference:.1e}")
        assert difference < TOLERANCE, "answers differ"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.model.check_release_layout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "transformers-4.43.1")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        inside(options.folder)
        return 0
    python = environment(options.venv)
    return subprocess.run(
        [python, "-m", "tests.model.check_release_layout", "--inside", options.folder.resolve()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
