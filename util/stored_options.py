"""Options that a checkpoint holds, checked as those of a command line are."""

import argparse

from util.cli import InputError
from util.state_checks import LONGEST_TEXT, shown


def check_stored(parser: argparse.ArgumentParser, stored: dict, path: str) -> None:
    """Raise InputError unless each option of a checkpoint could stand on the command line."""
    for action in parser._actions:
        if action.dest in stored:
            x = stored[action.dest]
            expected = _expected_instead(parser, action, x)
            if expected:
                raise InputError(
                    f"{path}: its option {action.dest} is {shown(x)}, expected {expected}; give "
                    f"{action.option_strings[0]}"
                )


def _expected_instead(parser: argparse.ArgumentParser, action: argparse.Action, x) -> str | None:
    """What a flag takes instead of a value; None: it takes this value."""
    if action.nargs == 0:
        return None if isinstance(x, bool) else "True or False"
    if isinstance(action.default, str):
        if not isinstance(x, str) or len(x) > LONGEST_TEXT or not x.isprintable():
            return f"a text of at most {LONGEST_TEXT} characters in one line"
    elif not isinstance(x, (int, float)) or isinstance(x, bool) or not abs(x) < 2**63:
        return f"a number, such as {action.default}"
    try:
        parser._check_value(action, parser._get_value(action, str(x)))
    except argparse.ArgumentError as error:
        return error.message.rpartition("expected ")[2]
    return None
