"""Argparse types for numbers; their errors name the numbers that are allowed."""

import argparse
import os
from collections.abc import Callable


def number(kind: type, low: float, strict: bool = False) -> Callable[[str], float]:
    """An argparse type for numbers of at least `low`, or above `low` if `strict`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (value > low if strict else value >= low) or value == float("inf"):
            bound = f"above {low}" if strict else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: expected a number {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse prints this name in its messages
    return parse


def fraction(text: str) -> float:
    """An argparse type for numbers of at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 0 and below 1")
    return value


COUNT, FROM_0 = number(int, 1), number(int, 0)
POSITIVE, NOT_NEGATIVE = number(float, 0, strict=True), number(float, 0)


def folder(text: str) -> str:
    """An argparse type for paths: `~` is the home folder; a slash at the end does not count."""
    return os.path.expanduser(text).rstrip(os.sep) or text


FOLDER = folder
