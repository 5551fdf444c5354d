"""Tables go between their marks and nowhere else."""

import pytest

from examples.documents import put_between


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("above\n<begin>\nold\n<end>\nbelow\n")
    put_between(path, ("<begin>", "<end>"), "new")
    assert path.read_text() == "above\n<begin>\nnew\n<end>\nbelow\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<begin>\n", "needs the line <begin>"),
        ("<begin><end><end>", "once each"),
        ("<end>\n<begin>\n", "has the line <end> above <begin>"),
    ],
)
def test_marks_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, text, message):
    path = tmp_path / "a.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        put_between(path, ("<begin>", "<end>"), "new")
    assert path.read_text() == text
