"""Where a model folder may be written: it replaces its predecessor, and never other files."""

from __future__ import annotations

import pytest

from model.artifact import ADAPTERS, CONFIG, FolderError, check_place


@pytest.mark.parametrize("suffix", ["", ".previous", ".partial"])
def test_other_files_in_the_place_of_a_model_folder_are_kept(tmp_path, suffix):
    there = tmp_path / f"model{suffix}"
    there.mkdir()
    check_place(tmp_path / "model")
    (there / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match=rf"model{suffix} holds thesis.tex and is no model folder"):
        check_place(tmp_path / "model")


def test_what_training_has_written_is_replaced(tmp_path):
    for suffix, names in (("", (CONFIG, "README.md")), (".previous", (CONFIG,)), (".partial", (ADAPTERS,))):
        (tmp_path / f"model{suffix}").mkdir()
        for name in names:
            (tmp_path / f"model{suffix}" / name).touch()
    check_place(tmp_path / "model")
