"""What every script of the project shares: one clear line for bad input, a bar for long work."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends it with one line on stderr and exit status 1.

    Only `InputError` and the operating system's errors (missing file, full disk) are shortened:
    anything else is a fault of ours, and its traceback is worth having. A DataLoader worker wraps
    an error in its own traceback, so only what follows the error's name is printed.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (InputError, OSError) as error:
        message = str(error).strip().rpartition("InputError: ")[2]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, suffix: str = ".part") -> Iterator[str]:
    """A name to write to beside `path`: renamed to it at the end, removed on an error.

    So the file is there whole or not at all, and an older one stays until then.
    """
    part = f"{os.fspath(path)}{suffix}"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def say(line: str) -> None:
    """Print a line at once, above a running bar."""
    tqdm.write(line)
    sys.stdout.flush()


def progress(items, desc: str, total: int | None = None):
    """A tqdm bar over `items` that leaves no trace, and is silent when stderr is not a terminal."""
    return tqdm(items, desc=desc, total=total, leave=False, disable=not sys.stderr.isatty())
