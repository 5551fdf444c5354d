"""core/file_names.py and core/json_files.py: what a file may name, and what a JSON file must hold."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.file_names import UnsafeName, file_size_inside, plain_name
from core.json_files import JsonError, parse_object, read_object
from tests.hostile import is_one_line


@pytest.mark.parametrize(
    "name", ["a", "part-000000.tar", "model-00001-of-00002.safetensors", "a b", "é.tar", "x" * 255, "a..b"]
)
def test_plain_names_pass(name):
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name, says",
    [
        ("../a", "a path"),
        ("a/b", "a path"),
        ("/a", "a path"),
        ("a\\b", "a path"),
        ("..", "dot"),
        (".", "dot"),
        (".profile", "dot"),
        ("", "is not a file name"),
        (None, "is not a file name"),
        (b"a", "is not a file name"),
        (["a"], "is not a file name"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x1b[31m", "control"),
        ("a\ud800", "control"),
        ("x" * 256, "longer than"),
        ("é" * 128, "longer than"),
    ],
)
def test_other_names_are_refused(name, says):
    with pytest.raises(UnsafeName, match=says):
        plain_name(name)


@given(st.text(max_size=300))
def test_a_name_that_passes_stays_in_its_folder(name):
    try:
        plain_name(name)
    except UnsafeName:
        return
    joined = os.path.normpath(os.path.join("/folder", name))
    assert os.path.dirname(joined) == "/folder" and os.path.basename(joined) == name


def test_sizes_of_files_inside(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.write_text("12345")
    (inside / "a").write_text("123")
    (inside / "same").symlink_to("a")
    (inside / "away").symlink_to("../out")
    (inside / "round").symlink_to("../in/a")
    assert (
        file_size_inside(inside, "a")
        == file_size_inside(inside, "same")
        == file_size_inside(inside, "round")
        == 3
    )
    with pytest.raises(UnsafeName, match="is a link to .*out, outside"):
        file_size_inside(inside, "away")
    with pytest.raises(UnsafeName, match="is not a regular file"):
        file_size_inside(tmp_path, "in")
    with pytest.raises(FileNotFoundError):
        file_size_inside(inside, "none")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("null", "JSON object"),
        (b"\xff\xfe{", "not"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_what_is_no_object_is_one_line(text, says):
    with pytest.raises(JsonError, match=says) as error:
        parse_object(text)
    assert is_one_line(error.value)


def test_files_of_objects(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(JsonError, match="is missing"):
        read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(JsonError, match="is not a regular file"):
        read_object(tmp_path)
    path.unlink()
    os.mkfifo(path)  # would never end
    with pytest.raises(JsonError, match="is not a regular file"):
        read_object(path)
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(JsonError, match="bytes, more than"):
        read_object(path)
