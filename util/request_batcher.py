"""The queue of serve.py: bodies are read, checked and scored in turn, within limits.

A request passes through three stages: the event loop reads its body, one thread checks the body and
converts it to tensors, and another thread scores all waiting requests as one batch.
"""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from starlette.requests import Request
from torch import Tensor

from util.request_bodies import Bodies, Refused, Turns, unless_gone


class Limits(NamedTuple):
    """The limits of one request, and of all requests together."""

    body_bytes: int = 64 * 2**20
    images: int = 256
    regions: int = 256
    words: int = 256
    fields: int = 64  # objects, lists and fields of a body, for each image allowed
    waiting: int = 64  # requests at a time whose body is whole
    held_bytes: int = 512 * 2**20  # of all bodies together
    seconds: float = 30.0  # to send a body, and again for the reply
    rate: int = 32 * 2**10  # bytes of a body that must come a second; it may be ...
    grace: float = 5.0  # seconds behind
    batch: int = 128  # images encoded at a time


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
        self.in_flight = self.answered = 0
        self.bodies = Bodies(self.limits.held_bytes, self.limits.rate, self.limits.grace)
        self.turns = Turns(self.limits.waiting)
        self.queue: asyncio.Queue[tuple[Query, asyncio.Future]] = asyncio.Queue()
        self.reader = ThreadPoolExecutor(1, "read")
        self.worker = ThreadPoolExecutor(1, "score")

    @property
    def held_bytes(self) -> int:
        return self.bodies.held

    async def answer(self, request: Request) -> dict[str, list[float]]:
        """The scores that a request asks for. Raises Refused."""
        limits = self.limits
        self.turns.place_for(request)  # if there is none, its body need not come
        self.in_flight += 1
        try:
            body = self.bodies.read(request, "application/json", limits.body_bytes, limits.seconds)
            async with body as raw, self.turns.take(request, limits.seconds):
                scores = await unless_gone(request, self.scores(raw))
        finally:
            self.in_flight -= 1
        if not all(math.isfinite(score) for way in scores.values() for score in way):
            raise Refused(422, "the scores are not finite: are features or vectors too large?")
        self.answered += 1
        return scores

    async def scores(self, raw: bytearray) -> dict[str, list[float]]:
        """Check and queue a body, and wait for its scores.

        If the call is cancelled while the body is in the queue, the body is not scored.
        """
        loop = asyncio.get_running_loop()
        query = await loop.run_in_executor(self.reader, self.scorer.read, raw)
        future = loop.create_future()
        self.queue.put_nowait((query, future))
        return await future

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
