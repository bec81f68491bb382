"""What all routes of serve.py share: the bodies of requests come in time, and the turns are fair.

A request takes a turn only when its body is whole. Where room is short, the client address that
takes most of it gives way, so that no address can shut out the others.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from fnmatch import fnmatch

from starlette.requests import ClientDisconnect, Request

DRAINS = 32  # refused bodies that are read to their end at a time
DRAINED_BYTES = 256 * 2**20  # of one of them
DRAIN_SECONDS = 5.0
TOO_LARGE = "too many large requests at once; try again"


class Refused(Exception):
    """A reply other than an answer: an HTTP status and a message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Place:
    """What a request takes of the server: a turn, or the bytes of its body."""

    def __init__(self, request: Request):
        client = getattr(request, "client", None)  # none over a Unix socket
        self.address = client.host if client else ""
        self.size = 0  # bytes
        self.ousted = False

    def oust(self) -> None:
        """End the block that `self.timeout` limits: somebody else needs the room."""
        self.ousted = True
        self.timeout.reschedule(0)


class Turns:
    """A number of requests at a time."""

    def __init__(self, most: int):
        self.most = most
        self.taken: list[Place] = []

    def place_for(self, request: Request) -> tuple[Place, Place | None]:
        """A new place, and the one that must give way to it. Raises Refused if none would."""
        new = Place(request)
        if len(self.taken) < self.most:
            return new, None
        held = Counter(place.address for place in self.taken)
        address, most = held.most_common(1)[0]
        if most <= held[new.address] + 1:
            raise Refused(503, f"{len(self.taken)} requests are waiting already; try again")
        return new, next(place for place in reversed(self.taken) if place.address == address)

    @asynccontextmanager
    async def take(self, request: Request, seconds: float) -> AsyncIterator[None]:
        """Run the block in a turn. Raises Refused if there is none, or if it takes too long."""
        place, other = self.place_for(request)
        if other is not None:
            self.taken.remove(other)
            other.oust()
        try:
            async with asyncio.timeout(seconds) as place.timeout:
                self.taken.append(place)
                yield
        except TimeoutError:
            if place.ousted:
                raise Refused(503, "too many requests of one address at once; try again") from None
            raise Refused(504, f"no answer in {seconds:g} s; try again") from None
        finally:
            with suppress(ValueError):  # it gave way
                self.taken.remove(place)


class FewAtOnce:
    """Around an application: so many requests without a body are worked on at a time, in order.

    Each is, until its answer begins. Else a flood of them fills each round of the event loop, and a
    large body, which comes in many rounds, takes seconds. A client that does not read its answer
    keeps nobody waiting.
    """

    def __init__(self, app, most: int = 8):
        self.app, self.turns = app, asyncio.Semaphore(most)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        with ExitStack() as turn:
            await self.turns.acquire()
            turn.callback(self.turns.release)

            async def send_in_turn(message) -> None:
                turn.close()
                await send(message)

            await self.app(scope, receive, send_in_turn)


class Bodies:
    """Reads bodies: each must keep up a least rate, and all together have a limit of bytes."""

    def __init__(self, held_bytes: int, rate: int, grace: float):
        """`rate`: bytes a second that must come; a body may be `grace` seconds behind."""
        self.most, self.rate, self.grace = held_bytes, rate, grace
        self.held = 0  # bytes of all bodies, until their requests are answered
        self.coming: list[Place] = []  # of bodies that are not whole, the oldest first
        self.drains = 0

    @asynccontextmanager
    async def read(
        self, request: Request, kind: str, most: int, seconds: float
    ) -> AsyncIterator[bytearray]:
        """The body of a request of some content-type, e.g. image/*; held until the block ends.

        Raises Refused if it is larger than `most` bytes, or does not come in time.
        """
        check_head(request, kind, most)
        raw, place = bytearray(), Place(request)
        try:
            await self.receive(request, raw, place, most, seconds)
            yield raw
        finally:
            self.held -= place.size

    async def receive(
        self, request: Request, raw: bytearray, place: Place, most: int, seconds: float
    ) -> None:
        """Append the body to `raw`. Raises Refused."""
        clock = asyncio.get_running_loop().time
        start = clock()
        due = start + self.grace
        try:
            async with asyncio.timeout(min(seconds, self.grace)) as place.timeout:
                self.coming.append(place)
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > most:
                        raise Refused(413, f"a body of over {most} bytes")
                    self.hold(place, len(chunk))
                    due = min(due + len(chunk) / self.rate, clock() + self.grace)
                    place.timeout.reschedule(min(due, start + seconds))
        except TimeoutError:
            if place.ousted:
                raise Refused(503, TOO_LARGE) from None
            said = f"no whole body in {clock() - start:.0f} s"
            if clock() - start < seconds:
                said += f", only {len(raw)} bytes; expected {self.rate} a second"
            raise Refused(408, said) from None
        finally:
            self.coming.remove(place)

    def hold(self, place: Place, size: int) -> None:
        """Count bytes of a body; if there are too many, unfinished bodies give way.

        Raises Refused if it is this one that must.
        """
        while self.held + size > self.most and not place.ousted:
            coming = [one for one in self.coming if one.size or one is place]
            taken = Counter()
            for one in coming:
                taken[one.address] += one.size
            other = max(coming, key=lambda one: taken[one.address])  # the oldest of that address
            self.held -= other.size
            other.size = 0
            other.oust()
        if place.ousted:
            raise Refused(503, TOO_LARGE)
        place.size += size
        self.held += size

    async def drain(self, request: Request) -> None:
        """Read and drop the rest of a refused body, within limits.

        Otherwise a client that still sends would get a broken connection instead of the reply.
        """
        if self.drains >= DRAINS or "expect" in request.headers:
            return
        self.drains += 1
        left = DRAINED_BYTES
        try:
            with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # it was read already
                async with asyncio.timeout(DRAIN_SECONDS):
                    stream, chunk = request.stream(), b""
                    while left > 0 and chunk is not None:
                        async with asyncio.timeout(1):
                            chunk = await anext(stream, None)
                        left -= len(chunk or b"")
        finally:
            self.drains -= 1


def check_head(request: Request, kind: str, most: int) -> None:
    """Raise Refused if the headers tell another content-type than `kind`, or too long a body."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not fnmatch(found, kind):
        raise Refused(415, f"content-type {found[:40]!r}: expected {kind}")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > most:
        raise Refused(413, f"a body of {told[:20]} bytes, expected at most {most}")


async def unless_gone(request: Request, work: Coroutine):
    """What a coroutine gives. If the client disconnects, it is cancelled: ClientDisconnect.

    The body of the request must have been read before; what is left of it is dropped.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    jobs = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        if not jobs[0].done():
            raise ClientDisconnect
        return jobs[0].result()
    finally:
        for job in jobs:
            job.cancel()
