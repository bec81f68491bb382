"""The open connections of serve.py: clients that keep it waiting are cut off.

uvicorn itself waits without end for the headers of a request, and for a client to take its answer.
The routes bound what happens in between (util/request_bodies.py).
"""

import asyncio
import socket
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from util.cli import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None

FILES = 4096  # that this process may open, if its hard limit allows as many
SWEEP_SECONDS = 0.5
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class ConnectionLimits(NamedTuple):
    """The limits of connections."""

    open: int = 1024  # at a time
    backlog: int = 1024  # not yet accepted; all of them may be accepted at once
    header_seconds: float = 10.0  # from the connection or the last answer to the end of the headers
    answer_seconds: float = 30.0  # to take an answer


def fitting_limits() -> ConnectionLimits:
    """The limits, with a third of the files that this process may open for each of the two kinds.

    Most systems allow a process 1,024 files, and more if it asks for them.
    """
    limits = ConnectionLimits()
    if resource is None:
        return limits
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < FILES:
        files = FILES if most < 0 else min(FILES, most)
        with suppress(ValueError, OSError):  # macOS may allow fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limits = ConnectionLimits(min(limits.open, files // 3), min(limits.backlog, files // 3))
    return limits


class Connections:
    """All open connections, within limits. Its method `make` is what uvicorn gets as `http`.

    When there are too many, the address that has most loses one: of those where the server waits
    for the client, for headers or for the rest of a body, the one where it has waited longest.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.open: dict[Connection, None] = {}  # the one where a wait began first comes first
        self.of_address: Counter[str] = Counter()
        self.sweeping: asyncio.TimerHandle | None = None

    def make(self, **given) -> "Connection":
        """A connection; uvicorn gives the arguments of its own class."""
        return Connection(self, **given)

    def add(self, new: "Connection") -> None:
        self.open[new] = None
        self.of_address[new.address] += 1
        if self.sweeping is None:
            self.sweep()
        if len(self.open) > self.limits.open:
            most = max(self.of_address.values())
            waiting = (one for one in self.open if one.waits)
            one = next((one for one in waiting if self.of_address[one.address] == most), new)
            self.discard(one)
            one.transport.abort()

    def discard(self, one: "Connection") -> None:
        if one in self.open:
            del self.open[one]
            self.of_address[one.address] -= 1
            self.of_address += Counter()  # without the addresses that have none

    def renew(self, one: "Connection") -> None:
        """Note that the server begins to wait for another request."""
        if one in self.open:
            self.open[one] = self.open.pop(one)

    def sweep(self) -> None:
        """Cut off the connections whose time is over, now and again until there are none."""
        loop = asyncio.get_running_loop()
        for one in list(self.open):
            one.check_time(loop.time())
        self.sweeping = loop.call_later(SWEEP_SECONDS, self.sweep) if self.open else None


class Connection(H11Protocol):
    """A connection that can tell what it waits for.

    Of uvicorn it uses, beside asyncio's methods: `cycle`, the request in progress or the last one,
    with `response_complete` and `more_body`; `conn`, that of h11; and `on_response_complete`.
    """

    def __init__(self, pool: Connections, **given):
        super().__init__(**given)
        self.pool, self.limits = pool, pool.limits
        self.since = 0.0  # when the server began to wait for a request
        self.unsent_since: float | None = None  # when a part of an answer began to wait

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the server waits for the client: for headers, or for the rest of a body."""
        return self.is_between_requests or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        self.pool.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.discard(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        self.pool.renew(self)
        super().on_response_complete()

    def check_time(self, now: float) -> None:
        """End the connection if the client has taken too long."""
        if self.transport.get_write_buffer_size():
            self.unsent_since = self.unsent_since or now
            if now - self.unsent_since > self.limits.answer_seconds:
                self.transport.abort()
            return
        self.unsent_since = None
        if self.is_between_requests and now - self.since > self.limits.header_seconds:
            if self.conn.trailing_data[0]:  # the headers have begun
                self.transport.write(LATE)
            self.transport.close()


def configure(app, seconds: int, limits: ConnectionLimits) -> uvicorn.Config:
    """How uvicorn runs an application; it gets `seconds` to answer when the server must stop."""
    return uvicorn.Config(
        app,
        http=Connections(limits).make,
        ws="none",
        log_level="error",  # not a line for each hostile request
        access_log=False,
        server_header=False,
        backlog=limits.backlog,
        timeout_graceful_shutdown=seconds,
    )


def open_socket(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be used."""
    # If the protocol is named, asyncio turns on TCP_NODELAY: each part of a reply is sent at once.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(backlog)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: {error}") from None
    return sock
