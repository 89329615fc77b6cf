"""What errors say, whatever was in a file or came from another library."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.errors import FormatError, HierMemError, of_the_machine, one_line


@given(st.text(), st.integers(1, 90))
def test_a_line_of_anything_is_printable_and_no_longer_than_it_may_be(text, longest):
    line = one_line(text, longest)
    assert line.isprintable() and len(line) <= longest
    assert str(HierMemError(f"{line}; try again")) == f"{line}; try again"


@given(st.text(), st.text())
def test_an_error_is_one_line_whose_end_says_what_to_do(name, other):
    for text in (name, 999 * name, 400 * name + other):
        line = str(HierMemError(f"{text}: is no corpus; make it again"))
        assert line.isprintable() and len(line) < 800 and line.endswith("make it again")
    assert str(HierMemError("x" * 700)) == "x" * 700


def test_short_words_stay_as_they_are():
    assert one_line(ValueError(" no such\n\tfile: é ")) == "no such file: é"
    assert one_line("a\0b") == "a\\x00b"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EMFILE, "allow more open files: ulimit -n"),
        (errno.ENFILE, "allow more open files: ulimit -n"),
        (errno.ENOSPC, "check the disk and its free space"),
    ],
)
def test_what_the_machine_has_not(number, says):
    line = of_the_machine(OSError(number, os.strerror(number), "a/b"))
    assert line.startswith(f"a/b: {os.strerror(number)}; {says}")
    assert of_the_machine(OSError(errno.EACCES, "no")) is None


def test_what_a_file_holds_does_not_blow_up_an_error(tmp_path):
    """Each of these characters takes four where it is shown."""
    config = {"model_type": "\0" * 10_000, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as caught:
        load_anchor(tmp_path)
    text = str(caught.value)
    assert "cannot be loaded" in text and len(text) < len(str(tmp_path)) + 400
