"""Errors are one printable line, whatever a file or a worker puts into them."""

import pytest

from util import cli
from util.cli import LONGEST, InputError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x.npy: row 3: NaN", "x.npy: row 3: NaN"),
        ("Straße 日本語 é", "Straße 日本語 é"),
        ("two\nlines\r\n", "two?lines??"),
        ("a\x1b[2Jclear", "a?[2Jclear"),
        ("nul\x00, del\x7f, \u2028, \u202e", "nul?, del?, ?, ?"),
        ("half \udcff", "half ?"),
    ],
)
def test_one_printable_line(text, line):
    assert str(InputError(text)) == one_line(text) == line
    line.encode()  # a terminal can show it


def test_a_long_message_keeps_its_ends():
    """The beginning has the file, the end what to do."""
    line = str(InputError("x.npy: " + "1" * 10**6 + "; copy it again"))
    assert len(line) <= LONGEST and line.startswith("x.npy: 111") and line.endswith("copy it again")


@pytest.mark.parametrize("kind", [InputError, OSError])
def test_of_a_workers_error_its_own_message_is_left(kind, capsys):
    text = (
        f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent "
        f"call last):\n  File ...\nutil.cli.{kind.__name__}: data/x.npy: row 3: NaN\n"
    )

    def main():
        raise kind(text)

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: data/x.npy: row 3: NaN\n"
