"""core/private_folder.py: a folder is used only if no other user can write to it."""

import os
import subprocess
import sys

import pytest

from core import private_folder as module
from core.private_folder import NotPrivate, check_private, private_folder, user_cache
from core.repository import ROOT
from model.ops import build

OTHER = 65534  # an unprivileged user
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")


def mode(path):
    return path.stat().st_mode & 0o7777


def test_a_new_folder_is_for_this_user_alone(tmp_path):
    old = os.umask(0)
    try:
        made = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert mode(made) == 0o700 and private_folder(made) == made


def test_a_folder_that_others_can_read_is_closed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o755)
    check_private(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o755
    assert mode(private_folder(tmp_path / "a")) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_refused(tmp_path, bits):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(bits)
    with pytest.raises(NotPrivate, match=r"a can be written by other users \(mode 1?\d{3}\): remove it"):
        private_folder(tmp_path / "a")


def test_links_and_files_are_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for name, says in (
        ("link", "is a link"),
        ("dangling", "is a link"),
        ("file", "cannot be opened as a folder"),
    ):
        with pytest.raises(NotPrivate, match=f"{name} {says}"):
            private_folder(tmp_path / name)


@as_root
def test_another_user_s_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir(mode=0o700)
    os.chown(tmp_path / "a", OTHER, OTHER)
    with pytest.raises(NotPrivate, match="belongs to another user .number 65534."):
        private_folder(tmp_path / "a")


def test_the_program_for_shell_scripts(tmp_path):
    def run(*folders):
        return subprocess.run(
            [sys.executable, "-IS", module.__file__, *folders], capture_output=True, text=True, cwd=ROOT
        )

    assert run(tmp_path / "one", tmp_path / "two").returncode == 0 and mode(tmp_path / "two") == 0o700
    (tmp_path / "one").chmod(0o777)
    done = run(tmp_path / "one")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_the_cache_follows_the_usual_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_cache() == tmp_path / "x"
    for unset in (
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
        lambda: monkeypatch.delenv("XDG_CACHE_HOME"),
    ):
        unset()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert user_cache() == tmp_path / "home" / ".cache"


def test_the_op_is_not_loaded_from_a_folder_that_others_can_write(tmp_path, monkeypatch):
    """The environment is read-only here, so the library goes to the user's cache."""
    monkeypatch.setattr(build.sys, "prefix", str(tmp_path / "file" / "environment"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "soundwave_ops"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(NotPrivate):
        build.build()
    build.load.cache_clear()
    with pytest.warns(
        UserWarning, match="slow plain PyTorch reference: .*soundwave_ops can be written by other users"
    ):
        assert build.load() is False
    build.load.cache_clear()
    cache.chmod(0o755)
    assert build._folder() == cache and mode(cache) == 0o700
