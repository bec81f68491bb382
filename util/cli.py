"""Used by all scripts: one-line errors for bad input, progress bars, whole files or none."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from util.arguments import did_you_mean, nearest

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """The user's input is wrong; the message says what is wrong, where, and what to do.

    The message is one line, whatever a file puts into it: see one_line.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def printable(text: str) -> str:
    """The text with ? for line breaks, control characters, and halves of characters."""
    return "".join(x if x.isprintable() else "?" for x in text)


def counted(number: int | str, what: str) -> str:
    """1 step, 3,000 steps, 3 more processes. A text is a number that is formatted already."""
    number = number if isinstance(number, str) else f"{number:,}"
    many = "es" if what.endswith("s") else "s"
    return f"{number} {what}{many if number != '1' else ''}"


def one_line(text: str) -> str:
    """A message as one line of printable characters, cut in its middle if it is very long.

    A DataLoader wraps an error of its worker in a traceback: of that, only the error's own message
    is kept.
    """
    if "\nOriginal Traceback" in text:
        text = text.strip().rpartition("Error: ")[2]
    text = printable(text)
    half = LONGEST // 2 - 5
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def run(main: Callable[[], None], clean_up: bool = False) -> None:
    """Run a script's `main`; bad input ends it with one line on stderr and exit status 1.

    With `clean_up`, SIGTERM and SIGHUP end it as Ctrl-C does: it removes what it has half written.

    Only `InputError` and the operating system's errors (missing file, full disk) are shortened.
    Any other exception is a bug in this project and keeps its traceback.
    """
    if clean_up:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (InputError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, suffix: str = ".part") -> Iterator[str]:
    """Yield a temporary name beside `path`; rename it to `path` at the end, remove it on an error.

    So `path` never holds half a file, and an older file stays until the new one is complete. A link
    stays a link: the file that it names is replaced.
    """
    path = os.path.realpath(path)
    part = f"{os.fspath(path)}{suffix}"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def choose(table: dict, name: str, flag: str):
    """The entry `name` of a table of variants. If it is missing, a ValueError lists them."""
    if name not in table:
        near = did_you_mean(nearest(str(name), table))
        raise ValueError(f"unknown {flag} {name!r}: expected one of {', '.join(table)}{near}")
    return table[name]


def say(line: str) -> None:
    """Print a line immediately, above a running progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def progress(items, desc: str, total: int | None = None):
    """A tqdm bar over `items`; it vanishes at the end, and is off if stderr is not a terminal."""
    return tqdm(items, desc=desc, total=total, leave=False, disable=not sys.stderr.isatty())
