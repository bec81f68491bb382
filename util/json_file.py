"""Read JSON files that anybody may have written, and show what a file holds in a message."""

import json
import os
import reprlib
from pathlib import Path

from util.cli import InputError, printable
from util.file_kinds import kind_of

LONGEST = 300  # letters of a library's message


def read_json(path: str | os.PathLike, what: str = "a JSON file"):
    """The value in a JSON file in UTF-8; `what` names in errors what was expected.

    Raises InputError that says what the file is instead, or the line and column of the fault.
    """
    data = Path(path).read_bytes()
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{path}: not {what} ({kind_of(path) or fault_of(error)})") from None


def read_object(path: str | os.PathLike, advice: str = "") -> dict:
    """As read_json, of a file that holds an object; `advice` says in errors what to do."""
    said = f"expected a JSON object{advice}"
    found = read_json(path, f"a JSON file: {said}")
    if not isinstance(found, dict):
        raise InputError(f"{path}: {said}")
    return found


def parse_json(data: str | bytes):
    """The value of a JSON text; bytes are UTF-8. Raises ValueError with one line.

    NaN and Infinity, which Python writes and JSON does not have, are refused, and so are values
    that are nested so deeply that no reader of Python's can follow.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _refuse(name: str):
    raise ValueError(f"{name} is no number of JSON")


def shown_value(x) -> str:
    """A value of a file for a message: its repr, cut where it is long, in one line."""
    return " ".join(reprlib.repr(x).split())


def fault_of(error: BaseException) -> str:
    """An error of a library for a message: its kind and its first line, cut where it is long."""
    said = first_line(str(error))
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def first_line(text: str) -> str:
    """The first line of a text for a message, cut where it is long."""
    line = (text.strip().splitlines() or [""])[0]
    cut = line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
    return printable(cut)
