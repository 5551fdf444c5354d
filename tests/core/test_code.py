"""core/code.py: the hash covers every Python file of the named packages, and a wrong package name is an
error."""

import re

import pytest

from core import code


def test_hash_changes_with_any_file(tmp_path, monkeypatch):
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "a.py").write_text("a = 1\n")
    (tmp_path / "one" / "inner" / "b.py").write_text("b = 1\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    first = code.code_hash(("one",))
    assert first == code.code_hash(("one",))
    (tmp_path / "one" / "inner" / "b.py").write_text("b = 2\n")
    assert code.code_hash(("one",)) != first


def test_package_without_files_is_an_error():
    with pytest.raises(FileNotFoundError):
        code.code_hash(("core", "no_such_package"))


def test_all_packages_have_files():
    assert len(code.code_hash(code.PACKAGES)) == 64


def test_jobs_run_a_copy_of_every_package():
    """A package that freeze leaves out would be imported from the checkout, which may change."""
    script = (code.ROOT / "slurm" / "lib" / "freeze.sh").read_text()
    (listed,) = re.findall(r"for part in ([\w ]+); do", script)
    assert set(listed.split()) == {*code.PACKAGES, "ds_configs", "slurm"}
