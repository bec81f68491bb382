"""The queue of serve.py: bodies are read, checked and scored in turn, within limits.

A request passes through three stages: the event loop reads its body, one thread checks the body and
converts it to tensors, and another thread scores all waiting requests as one batch.
"""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request
from torch import Tensor


class Limits(NamedTuple):
    """The limits of one request, and of all requests together."""

    body_bytes: int = 64 * 2**20
    images: int = 256
    regions: int = 256
    words: int = 256
    waiting: int = 64  # requests in progress at a time
    held_bytes: int = 512 * 2**20  # of all bodies together
    seconds: float = 30.0  # to send a body, and again for the reply
    batch: int = 128  # images encoded at a time
    drained_bytes: int = 256 * 2**20  # of a refused body, read and dropped
    drain_seconds: float = 5.0


class Refused(Exception):
    """A reply other than scores: an HTTP status and a message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Query(NamedTuple):
    """A request as tensors, in the form of a dataset's caption_item and image_item."""

    caption: dict[str, Tensor]
    images: list[dict[str, Tensor]]


class RequestBatcher:
    """Accepts requests, passes them to the scorer in batches, and enforces the limits.

    `scorer` has `limits`, read(body) -> Query and score(queries) -> answers.
    """

    def __init__(self, scorer):
        self.scorer, self.limits = scorer, scorer.limits
        self.in_flight = self.held_bytes = self.answered = 0
        self.queue: asyncio.Queue[tuple[Query, asyncio.Future]] = asyncio.Queue()
        self.reader = ThreadPoolExecutor(1, "read")
        self.worker = ThreadPoolExecutor(1, "score")

    async def answer(self, request: Request) -> dict[str, list[float]]:
        """The scores that a request asks for. Raises Refused."""
        if self.in_flight >= self.limits.waiting:
            raise Refused(503, f"{self.in_flight} requests are waiting already; try again")
        self.in_flight += 1
        kept = 0
        try:
            raw = bytearray()
            try:
                async with asyncio.timeout(self.limits.seconds):
                    async for chunk in self.chunks(request):
                        self.held_bytes += len(chunk)
                        kept += len(chunk)
                        if self.held_bytes > self.limits.held_bytes:
                            raise Refused(503, "too many large requests at once; try again")
                        raw += chunk
            except TimeoutError:
                raise Refused(408, f"no whole body in {self.limits.seconds:g} s") from None
            scores = asyncio.ensure_future(self.scores(raw))
            gone = asyncio.ensure_future(self.disconnected(request))
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await asyncio.wait((scores, gone), return_when=asyncio.FIRST_COMPLETED)
            except TimeoutError:
                raise Refused(504, f"not scored in {self.limits.seconds:g} s; try again") from None
            finally:
                gone.cancel()
                if not scores.done():
                    scores.cancel()
            if not scores.done():
                raise ClientDisconnect
            scores = scores.result()
            if not all(math.isfinite(score) for way in scores.values() for score in way):
                raise Refused(422, "the scores are not finite: are features or vectors too large?")
            self.answered += 1
            return scores
        finally:
            self.in_flight -= 1
            self.held_bytes -= kept

    async def scores(self, raw: bytearray) -> dict[str, list[float]]:
        """Check and queue a body, and wait for its scores.

        If the call is cancelled while the body is in the queue, the body is not scored.
        """
        loop = asyncio.get_running_loop()
        query = await loop.run_in_executor(self.reader, self.scorer.read, raw)
        future = loop.create_future()
        self.queue.put_nowait((query, future))
        return await future

    async def disconnected(self, request: Request) -> None:
        """Wait until the client disconnects; its body must have been read before."""
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def drain(self, request: Request) -> None:
        """Read and drop the rest of a refused body, within limits.

        Otherwise a client that still sends would get a broken connection instead of the reply.
        """
        left = self.limits.drained_bytes
        with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # the body was read already
            async with asyncio.timeout(self.limits.drain_seconds):
                stream, chunk = request.stream(), b""
                while left > 0 and chunk is not None:
                    async with asyncio.timeout(1):
                        chunk = await anext(stream, None)
                    left -= len(chunk or b"")

    async def chunks(self, request: Request):
        """Yield the chunks of a body; refuse it with 413 if it is, or says that it is, too long."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"content-type {kind[:40]!r}: expected application/json")
        limit, total = self.limits.body_bytes, 0
        told = request.headers.get("content-length", "0")
        if told.isdecimal() and int(told) > limit:
            raise Refused(413, f"a body of {int(told)} bytes, expected at most {limit}")
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise Refused(413, f"a body of over {limit} bytes")
            yield chunk

    async def work(self) -> None:
        """Score the waiting requests, batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            images = len(batch[0][0].images)
            while not self.queue.empty() and images < self.limits.batch:
                batch.append(self.queue.get_nowait())
                images += len(batch[-1][0].images)
            batch = [(query, future) for query, future in batch if not future.done()]
            try:
                queries = [query for query, _ in batch]
                answers = await loop.run_in_executor(self.worker, self.score, queries)
            except Exception as error:  # no thread could start; the next batch may get one
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def score(self, queries: list[Query]) -> list:
        """The answer or error of each query; if a batch fails, each query is scored alone."""
        if not queries:
            return []
        try:
            return self.scorer.score(queries)
        except Exception as error:
            if len(queries) == 1:
                return [error]
            return [self.score([query])[0] for query in queries]
