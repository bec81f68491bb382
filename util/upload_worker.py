"""Decode the pictures that util/uploads.py sends, one after the other. It starts this program.

    python -m util.upload_worker PIXELS SIDE SECONDS MEMORY

On stdin comes a picture: 8 bytes with its length, then its bytes. On stdout goes READY when the
program has started, READY for each picture that has arrived whole, and then a reply: HEAD (the kind
of the reply and two numbers), and what follows it by its kind:

- PIXELS: width and height, then height x width x 3 bytes of red, green and blue;
- REFUSED: the length of a message and 0, then the message;
- NO_MEMORY: 0 and 0; the program ends, so that nothing of the picture is left in its memory.

The end of stdin ends the program. It writes no file. It imports neither numpy nor torch: their
threads would take up much of the memory that it is allowed.
"""

import os
import signal
import struct
import sys
from typing import BinaryIO

from util.cli import InputError
from util.pictures import open_picture

try:
    import resource
except ImportError:  # Windows
    resource = None

READY = b"."
LENGTH = struct.Struct("<Q")
HEAD = struct.Struct("<cII")
PIXELS, REFUSED, NO_MEMORY = b"P", b"R", b"M"
LONGEST_MESSAGE = 500  # bytes


def bound(memory: int) -> None:
    """Bound the address space of this process to `memory` bytes, and forbid it to write files.

    Windows has no such bound. macOS refuses one on the address space; the rest holds there too.
    """
    if resource is None:
        return
    for name, most in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_AS", memory)):
        hard = resource.getrlimit(getattr(resource, name))[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def ran_out(error: BaseException | None) -> bool:
    """Whether an error comes from one that says that memory is missing."""
    while error is not None:
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def decode(data: bytes, pixels: int, side: int) -> tuple[bytes, int, int, bytes]:
    """The reply to a picture: its kind, two numbers, and what follows."""
    try:
        picture = open_picture(data, max_pixels=pixels)
        picture.thumbnail((side, side))
        return PIXELS, *picture.size, picture.tobytes()
    except Exception as error:  # a damaged picture can raise anything
        if ran_out(error):
            return NO_MEMORY, 0, 0, b""
        if not isinstance(error, InputError):
            error = f"it is not a picture, or it is damaged ({type(error).__name__})"
        message = str(error).encode(errors="replace")[:LONGEST_MESSAGE]
        return REFUSED, len(message), 0, message


def serve(take: BinaryIO, give: BinaryIO, pixels: int, side: int, seconds: int) -> None:
    """Read pictures and write replies until the input ends, or memory runs out."""

    def send(*parts: bytes) -> None:
        for part in parts:
            give.write(part)
        give.flush()

    send(READY)
    kind = None
    while kind != NO_MEMORY:
        head = take.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        data = take.read(LENGTH.unpack(head)[0])
        send(READY)
        if hasattr(signal, "alarm"):  # if nobody is left to end this process, this does
            signal.alarm(seconds)
        kind, *numbers, rest = decode(data, pixels, side)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        send(HEAD.pack(kind, *numbers), rest)


def main() -> None:
    from PIL import Image

    pixels, side, seconds, memory = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this one
    give = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library may print does not get between the replies
    Image.init()  # loads all formats now, not while the first picture's time runs
    bound(memory)
    serve(sys.stdin.buffer, give, pixels, side, seconds)


if __name__ == "__main__":
    main()
