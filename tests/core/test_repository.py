"""core/repository.py: the hash covers every Python file of the named packages, and a wrong package name is an
error."""

import re

import pytest

from core import repository


def test_hash_changes_with_any_file(tmp_path, monkeypatch):
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "a.py").write_text("a = 1\n")
    (tmp_path / "one" / "inner" / "b.py").write_text("b = 1\n")
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    first = repository.code_hash(("one",))
    assert first == repository.code_hash(("one",))
    (tmp_path / "one" / "inner" / "b.py").write_text("b = 2\n")
    assert repository.code_hash(("one",)) != first


def test_package_without_files_is_an_error():
    with pytest.raises(FileNotFoundError):
        repository.code_hash(("core", "no_such_package"))


def test_all_packages_have_files():
    assert len(repository.code_hash(repository.PACKAGES)) == 64


def test_jobs_run_a_copy_of_every_package():
    """A package that freeze leaves out would be imported from the checkout, which may change."""
    script = (repository.ROOT / "slurm" / "lib" / "freeze.sh").read_text()
    (listed,) = re.findall(r"for part in ([\w ]+); do", script)
    assert set(listed.split()) == {*repository.PACKAGES, "ds_configs", "slurm"}
