"""Valid files of every reader, damage to them, and what a reader may do with the result.

A `Reader` makes a small valid file and reads it as a user's command does. `mutate` damages bytes.
`Bench.try_one` gives a reader any bytes in the place of its file. The reader may return a value, or
refuse the file in one line: an InputError, an OSError that names a path, a SystemExit. All else is
a `Crash`: another exception, more than SECONDS, more than MEMORY beside what the process has, text
of more than LONGEST characters, or text that a terminal cannot show in one line.

tests/test_readers.py and scripts/fuzz_readers.py use it. The readers stand in reader_arrays.py,
reader_checkpoints.py and reader_texts.py.
"""

import contextlib
import io
import random
import re
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from util.cli import InputError, one_line

ACCEPTED, REFUSED = "accepted", "refused"
SECONDS = 10
MEMORY = 2**30  # bytes
LONGEST = 2000  # characters


class Reader(NamedTuple):
    """A kind of file, and how the project reads it."""

    name: str
    make: Callable[[Path], Path]  # writes a valid file and its company; returns the file to damage
    read: Callable[[Path], object]  # reads that file with the project's own functions
    checked: bool = False  # a checksum can tell damage: an accepted file must give the same value
    edit: Callable[[bytes, random.Random], bytes] | None = None  # damage that knows the format


class Crash(AssertionError):
    """A reader neither returned a value nor refused the file in one line."""


class SilentlyWrong(Crash):
    """A reader took a damaged file for another one, though its checksum does not fit."""


def readers() -> list[Reader]:
    """All readers. Their modules are imported here, since they import this one."""
    from tests import reader_arrays, reader_checkpoints, reader_texts

    return [*reader_arrays.READERS, *reader_checkpoints.READERS, *reader_texts.READERS]


class Bench:
    """A reader with a valid file of its own in an empty folder."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader = reader
        with capturing():
            self.path = reader.make(folder)
            self.valid = self.path.read_bytes()
            self.value = reader.read(self.path)

    def damaged(self, rng: random.Random) -> bytes:
        """The valid file with damage."""
        if self.reader.edit and rng.random() < 0.3:
            return self.reader.edit(self.valid, rng)
        return mutate(self.valid, rng)

    def try_one(self, data: bytes) -> str:
        """Whether the reader accepts or refuses a file; raises Crash if it does neither."""
        self.path.unlink(missing_ok=True)  # an earlier reader may have mapped the file
        self.path.write_bytes(data)
        with capturing() as printed:
            try:
                with bounded():
                    value = self.reader.read(self.path)
                said = None
            except (InputError, OSError, SystemExit) as error:
                said = message_of(error)
            except BaseException as error:
                raise Crash(f"{type(error).__name__}: {str(error)[:LONGEST]}") from error
        for line in printed.getvalue().splitlines():
            check_line(line)
        if said is not None:
            check_line(said)
            return REFUSED
        if self.reader.checked and not same(value, self.value):
            raise SilentlyWrong(f"accepted, with another value than the whole file: {value!r:.200}")
        return ACCEPTED


@contextlib.contextmanager
def capturing() -> Iterator[io.StringIO]:
    """Collect what is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield printed


class Hang(BaseException):
    """Too slow; not an Exception, which a reader might catch."""


@contextlib.contextmanager
def bounded(seconds: int = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise Hang after some seconds, and a MemoryError for more memory, where the system can."""

    def stop(number, frame):
        raise Hang(f"more than {seconds} s")

    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        if hasattr(signal, "SIGALRM"):  # Windows has none
            before = signal.signal(signal.SIGALRM, stop)
            stack.callback(signal.signal, signal.SIGALRM, before)
            signal.alarm(seconds)
            stack.callback(signal.alarm, 0)
        yield


def message_of(error: BaseException) -> str:
    """What a user reads of an error that ends a program in one line."""
    if isinstance(error, SystemExit):
        if not isinstance(error.code, str):
            raise Crash(f"SystemExit({error.code!r}): expected a line that says why")
        return error.code
    if isinstance(error, OSError) and not (error.filename or "/" in str(error)):
        raise Crash(f"{type(error).__name__} without a path: {error}") from error
    return one_line(str(error))


def check_line(text: str) -> None:
    """Raise Crash unless a terminal can show the text in one line of a bounded length."""
    if len(text) > LONGEST:
        raise Crash(f"a message of {len(text)} characters: {text[:200]!r}")
    if not text.replace("\t", " ").isprintable():
        raise Crash(f"a message of several lines, or with control characters: {text!r}")


def same(a: object, b: object) -> bool:
    """Whether two values of a reader are equal, NaN beside NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and same(a.detach().numpy(), b.detach().numpy())
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
NUMBERS = (
    *(b"0", b"-1", b"-0.0", b"2.9", b"NaN", b"nan", b"Infinity", b"-inf", b"1e30", b"1e400"),
    *(b"true", b"null", b'"1"', b"[]", b"0x10", b"1_0", b"2147483648", b"9223372036854775808"),
    *("\u0663".encode(), "\u00b2".encode(), b"9" * 5000, b"-" + b"9" * 400, b"1." + b"0" * 5000),
)
SPLICES = (
    *(b"\0", b"\n", b"\r\n", b"\r", b"\t", b",", b'"', b"\\", b"'", b" ", b"\x1b[31m", b"\x85"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe"),
    *("\u2028".encode(), "\u202e".encode(), b"\\u0000", b"..", b"../" * 50, b"/dev/null"),
    *(b"[" * 100_000, b'{"a":' * 20_000, b"(" * 2000, b"[" * 500 + b"]" * 500, b"{}", b"[]"),
    *(b"x" * 70_000, b"\n" * 5000, b"\0" * 4096, b"a " * 20_000, b"<b>&amp;</b>"),
    *(struct.pack("<q", n) for n in (-1, 1, 2**31, 2**40, -(2**63))),
    *(struct.pack("<i", n) for n in (-1, 2**31 - 1, 2**20)),
    *(struct.pack("<f", x) for x in (float("nan"), float("inf"), 1e30, -1.0)),
    *(b"\x80\x02", b"\x80\x04", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"\x93NUMPY\x01\0"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file: mostly in one place, seldom in many, and seldom other bytes instead."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.choice([0, 1, 2, 10, 100, 1000]))
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3, 10])):
        data = rng.choice(DAMAGE)(data, place(data, rng), rng)
    return data


def place(data: bytes, rng: random.Random) -> int:
    """A place in a file; often near an end, where formats have their tables."""
    n = len(data)
    near = min(rng.choice([16, 64, 256]), n)
    return rng.choice([rng.randint(0, n), rng.randint(0, near), rng.randint(n - near, n)])


def flip_bit(data: bytes, at: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    if at < len(data):
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def change_byte(data: bytes, at: int, rng: random.Random) -> bytes:
    value = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return data[:at] + bytes([value]) + data[at + 1 :]


def cut_end(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at]


def cut_start(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[at:]


def remove(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + data[at + rng.choice([1, 2, 4, 16, 200]) :]


def repeat(data: bytes, at: int, rng: random.Random) -> bytes:
    end = at + rng.choice([1, 4, 16, 200, len(data)])
    return data[:end] + data[at:end] * rng.choice([1, 1, 2, 50])


def swap(data: bytes, at: int, rng: random.Random) -> bytes:
    n = rng.choice([1, 4, 16, 200])
    return data[:at] + data[at + n : at + 2 * n] + data[at : at + n] + data[at + 2 * n :]


def insert(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + rng.choice([rng.choice(SPLICES), rng.randbytes(4)]) + data[at:]


def overwrite(data: bytes, at: int, rng: random.Random) -> bytes:
    new = rng.choice(SPLICES)
    return data[:at] + new + data[at + len(new) :]


def blank(data: bytes, at: int, rng: random.Random) -> bytes:
    """Zero bytes, as a power cut leaves them in the place of a block."""
    n = len(data[at : at + rng.choice([8, 64, 512])])
    return data[:at] + bytes(n) + data[at + n :]


def change_number(data: bytes, at: int, rng: random.Random) -> bytes:
    """Another value in the place of the next number that is written in digits."""
    found = NUMBER.search(data, at) or NUMBER.search(data)
    if not found:
        return flip_bit(data, at, rng)
    return data[: found.start()] + rng.choice(NUMBERS) + data[found.end() :]


DAMAGE = (
    *(flip_bit, flip_bit, change_byte, cut_end, cut_start, remove, repeat, swap),
    *(insert, overwrite, blank, change_number, change_number),
)
