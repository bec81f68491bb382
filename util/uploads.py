"""Decode uploaded pictures in a process of their own, within limits.

    with PictureReader() as reader:
        picture = reader.read(data)  # (H, W, 3) uint8

A decoder of pictures is a large program in C that a stranger's bytes can crash, hang or bloat. So
util/upload_worker.py does it, and only sizes, raw pixels and messages come back through its pipe.
"""

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util.cli import InputError, printable
from util.upload_worker import (
    HEAD,
    LENGTH,
    LONGEST_MESSAGE,
    NO_MEMORY,
    PIXELS,
    READY,
    REFUSED,
)

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60  # for the worker's imports, on a busy machine


class PictureLimits(NamedTuple):
    """What an uploaded picture may take.

    `memory` bounds the address space of the worker: its program (45 MB), the bytes of the picture
    and all its copies. 50 million pixels took 0.4 to 0.9 GB, and WebP with transparency 1.3 GB.
    """

    bytes: int = 20 * 2**20
    pixels: int = 50 * 10**6
    side: int = 1600  # pixels of the longer side; a larger picture is made smaller
    seconds: float = 10.0  # to decode it, and to wait for other pictures
    memory: int = 1500 * 10**6  # bytes


class Unavailable(InputError):
    """No picture can be read now; nothing is wrong with the picture."""


def command(limits: PictureLimits) -> list[str]:
    """The command that starts a worker. It ends itself a while after it should have been ended."""
    numbers = limits.pixels, limits.side, int(limits.seconds) + 2, limits.memory
    return [sys.executable, "-m", "util.upload_worker", *map(str, numbers)]


@contextmanager
def killed_after(process: subprocess.Popen, seconds: float) -> Iterator[None]:
    """Kill a process if the block takes too long: its pipes then end. Raises TimeoutError."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, EOFError):
        if late.is_set():
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
        timer.join()


def take(file: BinaryIO, n: int) -> bytes:
    """Read exactly n bytes of a pipe. Raises EOFError if it ends before."""
    data = file.read(n)
    if len(data) < n:
        raise EOFError
    return data


class PictureReader:
    """Decodes one picture at a time in a worker process, which it replaces when it is lost.

    It can be used from any thread. The worker ends with close(), and by itself if this process is
    gone. It gets no file of this process but its two pipes, so no listening socket. Where Python
    has no module `resource` (Windows), and on macOS, its memory is not bounded.
    """

    def __init__(self, limits: PictureLimits | None = None):
        """Start the worker. Raises InputError if Pillow is not there."""
        if importlib.util.find_spec("PIL") is None:
            raise InputError("uploaded pictures need Pillow: pip install pillow")
        self.limits = limits or PictureLimits()
        self.lock = threading.Lock()
        self.closed = False
        self.start()

    def __enter__(self) -> "PictureReader":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def read(self, data: bytes) -> np.ndarray:
        """The picture that `data` holds, (H, W, 3) uint8: turned upright, and made smaller.

        Raises InputError, with one line, if it is not a picture of an accepted format, is damaged,
        or takes more than the limits; Unavailable if other pictures keep the worker busy, if no
        worker starts, or after close(). The next call works in any case.
        """
        limits = self.limits
        if not data:
            raise InputError("the picture has 0 bytes")
        if len(data) > limits.bytes:
            found = f"the picture has {len(data):,} bytes"
            raise InputError(f"{found}; at most {limits.bytes:,} are allowed")
        if not self.lock.acquire(timeout=limits.seconds):
            raise Unavailable("busy with other pictures: try again")
        try:
            reply = self.ask(data)
        finally:
            self.lock.release()
        if isinstance(reply, str):
            raise InputError(reply)
        return reply

    def close(self) -> None:
        """End the worker. A picture that another thread reads is given up."""
        self.closed = True
        self.process.kill()
        with self.lock:
            self.stop()

    def check_open(self) -> None:
        """Raises Unavailable after close()."""
        if self.closed:
            raise Unavailable("the reader of pictures is closed")

    def start(self) -> None:
        """Start a worker, without waiting for it. Raises Unavailable."""
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                command(self.limits), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=nothing
            )
        except OSError as error:  # no memory, too many processes
            what = "the program that decodes pictures does not start"
            raise Unavailable(f"{what}: {error.strerror}") from None
        self.waited = False

    def stop(self) -> None:
        """End the worker, and close its pipes."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what the pipe did not take
                file.close()

    def restart(self) -> None:
        """Replace the worker, unless close() was called."""
        self.stop()
        if not self.closed:
            self.start()

    def wait(self) -> None:
        """Wait until the worker has started. Raises Unavailable."""
        if not self.closed and self.process.poll() is not None:
            self.restart()
        self.check_open()
        if self.waited:
            return
        try:
            with killed_after(self.process, START_SECONDS):
                take(self.process.stdout, len(READY))
        except (TimeoutError, EOFError):
            told = "python -m util.upload_worker says why"
            raise Unavailable(f"the program that decodes pictures does not start: {told}") from None
        self.waited = True

    def ask(self, data: bytes) -> np.ndarray | str:
        """Let the worker decode a picture: the pixels (H, W, 3), or why there are none."""
        for _ in range(2):
            try:
                self.wait()
                reply = self.exchange(data)
            except ConnectionResetError:  # the worker ended before it had this picture
                self.restart()
            except TimeoutError:
                self.restart()
                return f"decoding the picture took longer than {self.limits.seconds:g} s"
            except EOFError:
                self.restart()
                self.check_open()
                return "the picture cannot be decoded: its decoder broke off"
            except BaseException:  # Ctrl-C: the reply must not become that of the next picture
                self.restart()
                raise
            else:
                if reply is None:
                    self.restart()
                    return f"decoding the picture needs more than {self.limits.memory:,} bytes"
                return reply
        raise Unavailable("the program that decodes pictures was ended twice: try again")

    def exchange(self, data: bytes) -> np.ndarray | str | None:
        """The reply of a worker that waits: pixels (H, W, 3), a message, or None for no memory.

        Raises ConnectionResetError if it ends before it has the picture, EOFError if it ends
        later or replies what its program does not reply, TimeoutError if it is too slow.
        """
        to, of, side = self.process.stdin, self.process.stdout, self.limits.side
        with killed_after(self.process, self.limits.seconds):
            try:
                to.write(LENGTH.pack(len(data)))
                to.write(data)
                to.flush()
                take(of, len(READY))
            except (OSError, EOFError):
                raise ConnectionResetError from None
            kind, first, second = HEAD.unpack(take(of, HEAD.size))
            if kind == PIXELS and 0 < first <= side and 0 < second <= side:
                pixels = np.empty((second, first, 3), np.uint8)  # (H, W, 3)
                if of.readinto(pixels.data.cast("B")) == pixels.size:
                    return pixels
            elif kind == REFUSED and first <= LONGEST_MESSAGE:
                message = take(of, first).decode(errors="ignore")
                return printable(message)
            elif kind == NO_MEMORY:
                return None
            raise EOFError
