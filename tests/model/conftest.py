from __future__ import annotations

from zlib import crc32

import pytest
import torch

from model.soundwave import Soundwave
from tests.model import tiny


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny Whisper and of a tiny Llama, of the module's own."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return tiny.whisper(root / "whisper"), tiny.llm(root / "llm", "llama")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a tiny Whisper and of a tiny LLM of each family, made when first asked for."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def get(name: str, **options) -> str:
        key = (name, *sorted(options.items()))
        if key not in made:
            torch.manual_seed(crc32(repr(key).encode()))  # whichever test comes first
            folder = root / f"{name}-{len(made)}"
            made[key] = (
                tiny.whisper(folder, **options) if name == "whisper" else tiny.llm(folder, name, **options)
            )
        return made[key]

    return get


@pytest.fixture
def model(folders) -> Soundwave:
    """All parts, tied head, eval mode, with LoRA and look-back that do something."""
    return build(folders)


def build(
    folders,
    family: str = "llama_tied",
    parts=("encoder", "adapters", "llm"),
    llm_options: dict | None = None,
    **alignment,
) -> Soundwave:
    """As `model`, of another family or with other settings of the alignment adapter."""
    config = tiny.config(folders("whisper"), folders(family, **(llm_options or {})), **alignment)
    torch.manual_seed(1)  # behind what may make the folders: whichever test comes first
    model = Soundwave.build(config, parts=parts).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("shrinking.out"):
                parameter.normal_(0, 0.1)
        if model.ctc_head.blank_row is not None:
            model.ctc_head.blank_row.normal_(0, 0.2)
    return model
