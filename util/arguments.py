"""What all programs read their arguments with: a parser, and types for numbers and folders.

An error is one line that names what is wrong and what may have been meant.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

NEAR = 0.75  # likeness of two names, from 0 to 1: a slip of the keyboard, not another word


class Parser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, whose errors are one line without a page of usage.

    A flag or a choice that does not exist is named together with the nearest one that does.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **{"allow_abbrev": False} | settings)
        self.register("type", int, lambda text: convert(int, text, "a whole number"))
        self.register("type", float, lambda text: convert(float, text, "a number"))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.prog}: {message}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        words = list(sys.argv[1:] if args is None else args)
        if not {"-h", "--help"} & set(words):
            self._check_flags(words)
        opt, left = self.parse_known_args(words, namespace)
        for word in left:
            if word != "--":
                self._refuse(word, words)
        return opt

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace=None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if not {"-h", "--help"} & set(words):
            for flag, equals, value in self._flags_of(words):
                action = self._option_string_actions.get(flag)
                if action is not None and action.nargs == 0 and equals:
                    self.error(f"{flag} takes no value, found {value or repr(value)}")
        return super().parse_known_args(words, namespace)

    @staticmethod
    def _flags_of(words: list[str]) -> list[tuple[str, str, str]]:
        """What may be flags: (--flag, =, value) of each word before a --."""
        return [x.partition("=") for x in words[: words.index("--") if "--" in words else None]]

    def _check_flags(self, words: list[str]) -> None:
        """End the program if a flag does not exist; argparse may name what is missing first."""
        flags, unknown = self._option_string_actions, {}
        for parts in self._flags_of(words):
            if parts[0] not in flags and re.fullmatch(r"--?[A-Za-z]\S*", "".join(parts)):
                unknown[parts[0]] = nearest(parts[0], flags)
        if len(unknown) > 1:
            said = [f"{flag} ({near}?)" if near else flag for flag, near in unknown.items()]
            self.error(f"unknown flags {', '.join(said)} (--help lists all)")
        for flag, near in unknown.items():
            self.error(f"unknown flag {flag}{did_you_mean(near)} (--help lists all)")

    def _refuse(self, word: str, words: list[str]) -> NoReturn:
        """End the program because of a word that is no flag's value."""
        at = words.index(word)
        before = words[at - 1] if at and words[at - 1] != "--" else ""
        flag = self._option_string_actions.get(before)
        if flag is not None and flag.nargs == 0:
            self.error(f"{before} takes no value, found {word}")
        after = f", after {before}," if before else ""
        several = [x.dest for x in self._get_positional_actions() if x.nargs in ("+", "*")]
        together = f", and all of {several[0].upper()} stand together" if several else ""
        self.error(
            f"{word}{after} belongs to no flag: a value stands behind its flag, a path with blanks "
            f"in quotes{together}"
        )

    def _check_value(self, action: argparse.Action, value) -> None:
        """argparse calls this for a flag that has choices."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = did_you_mean(nearest(str(value), names))
            said = f"{value or repr(value)}: expected one of {', '.join(names)}{near}"
            raise argparse.ArgumentError(action, said)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt word probably stands for, if there is one.

    It is much like the word, or has the same letters (--uot), or begins with the word.
    """
    plain = {as_plain(name): name for name in names}
    word = as_plain(word)
    found = difflib.get_close_matches(word, plain, n=1, cutoff=NEAR)
    found = found or [name for name in plain if sorted(name) == sorted(word)]
    found = found or [name for name in plain if len(word) > 2 and name.startswith(word)]
    return plain[found[0]] if found else None


def as_plain(name: str) -> str:
    """A name in lower case, with underscores, without the dashes at its head."""
    return name.lstrip("-").replace("-", "_").lower()


def did_you_mean(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""


def convert(kind: type, text: str, expected: str) -> float:
    """A number of a text; argparse prints the error with the flag before it."""
    try:
        return kind(text)
    except ValueError:
        raise wrong(text, expected) from None


def wrong(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text or repr(text)}: expected {expected}")


def number(kind: type, low: float, strict: bool = False) -> Callable[[str], float]:
    """An argparse type for numbers of at least `low`, or above `low` if `strict`."""
    bound = f"above {low}" if strict else f"of at least {low}"

    def parse(text: str) -> float:
        value = convert(kind, text, f"a {'whole ' if kind is int else ''}number {bound}")
        if not (value > low if strict else value >= low) or value == float("inf"):
            raise wrong(text, f"a number {bound}")
        return value

    return parse


def fraction(text: str) -> float:
    """An argparse type for numbers of at least 0 and below 1."""
    expected = "a number of at least 0 and below 1"
    value = convert(float, text, expected)
    if not 0 <= value < 1:
        raise wrong(text, expected)
    return value


COUNT, FROM_0 = number(int, 1), number(int, 0)
POSITIVE, NOT_NEGATIVE = number(float, 0, strict=True), number(float, 0)


def folder(text: str) -> str:
    """An argparse type for paths: `~` is the home folder; a slash at the end does not count."""
    return os.path.expanduser(text).rstrip(os.sep) or text


FOLDER = folder
