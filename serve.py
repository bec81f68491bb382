"""Scores over HTTP: loads a checkpoint once, then answers until it is stopped.

    pip install fastapi uvicorn
    python serve.py runs/x/model_best.pth.tar                # http://127.0.0.1:5091
    curl http://127.0.0.1:5091/health                        # the API is described at /docs

POST /scan_sentence_image_score takes {"sentence": [words], "boxes": [bottom-up-attention records],
"whole_items": [a vector an image]} and answers {"sim_t2i": [a score an image], "sim_i2t": [...]}:
what evaluation.py computes, in both directions. Nothing is kept from one request to the next or
written to disk. A request goes through three hands: the event loop reads its body, a thread checks
it and turns it into tensors, and one more thread scores all that wait as one batch.

Letters: R regions, F numbers a region, W words.
"""

import argparse
import asyncio
import math
import os
import signal
import socket
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

import checkpoint as ckpt
from data import adjacency, collate_fn
from evaluation import pick_device, to_device
from model import SCAN
from util.cli import InputError, run
from util.convert_data import decode
from util.positions import find_blocks

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, FailFast, Field, FiniteFloat, ValidationError
    from starlette.requests import ClientDisconnect
except ImportError as error:
    message = f"serve.py needs {error.name}, which is not installed: pip install fastapi uvicorn"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from None

PORT = 5091  # the published server's
DIRECTIONS = ("t2i", "i2t")


class Limits(NamedTuple):
    """What one request, and all of them, may take."""

    body_bytes: int = 64 * 2**20
    images: int = 256
    regions: int = 256
    words: int = 256
    waiting: int = 64  # requests read, checked or queued at a time
    held_bytes: int = 512 * 2**20  # of all bodies at a time
    seconds: float = 30.0  # to send a body, and again to be answered
    batch: int = 128  # images encoded at a time
    drained_bytes: int = 256 * 2**20  # read and dropped of a body that is refused
    drain_seconds: float = 5.0


# The lists of a body end at their first fault, and at these lengths whatever the limits: a list of
# faults would be many times larger than the body.
MOST = 2**16
FEW = FailFast(), Field(min_length=1, max_length=MOST)


class Record(BaseModel):
    """An image as bottom-up-attention's tsv has it; other fields are not read."""

    image_id: int | str | None = None
    image_w: Annotated[FiniteFloat, Field(gt=0, description="width in pixels")]
    image_h: Annotated[FiniteFloat, Field(gt=0, description="height in pixels")]
    num_boxes: Annotated[int, Field(ge=1, le=10**6, description="regions R")]
    boxes: Annotated[str, Field(description="base64 of float32 (R, 4): left, top, right, bottom")]
    features: Annotated[str, Field(description="base64 of float32 (R, F)")]


class Body(BaseModel):
    """A sentence and the images to score it with; other fields are not read."""

    sentence: Annotated[list[str], *FEW, Field(description="its words")]
    boxes: Annotated[list[Record], *FEW, Field(description="an image a record")]
    whole_items: Annotated[
        list[Annotated[list[FiniteFloat], *FEW]],
        *FEW,
        Field(description="for pfan_whole: (F,) an image"),
    ] = None
    dependencies: Annotated[
        list[tuple[int, int]],
        *FEW,
        Field(description="for a sparse GSMN: [governor, dependent], <start> is 0, the root first"),
    ] = None


class Scores(BaseModel):
    """A score an image, in the order of the request, in each direction."""

    sim_t2i: list[float]
    sim_i2t: list[float]


class Refused(Exception):
    """An answer other than scores: an HTTP status and what to say."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Query(NamedTuple):
    """A request as tensors: what a dataset's caption_item and image_item give."""

    caption: dict[str, Tensor]
    images: list[dict[str, Tensor]]


def explain(error: ValidationError) -> str:
    """The faults of a body, each with its place."""
    said = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        place = ".".join(map(str, fault["loc"]))
        said.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return "; ".join(said)


class Scorer:
    """A model, and how requests become its batches."""

    def __init__(self, path: str, vocab_path: str | None, device: torch.device, limits: Limits):
        self.model, self.vocab, self.opt = ckpt.load_model(path, vocab_path, device)
        self.model.eval()
        if self.opt.text_enc_type == "bert":
            room = self.opt.bert_config["max_position_embeddings"]
            limits = limits._replace(words=min(limits.words, room))
        self.device, self.limits = device, limits
        self.vocab.encode("a word")  # what a tokenizer lacks is to be said now, not to a client

    def read(self, raw: bytes | bytearray) -> Query:
        """A request's body, checked. Raises Refused."""
        try:
            body = Body.model_validate_json(raw)
        except ValidationError as error:
            raise Refused(422, explain(error)) from None
        try:
            return self.query(body)
        except InputError as error:
            raise Refused(422, str(error)) from None

    def query(self, body: Body) -> Query:
        """Tensors of a body; InputError says what does not fit."""
        limits, system = self.limits, self.opt.model
        sentence = " ".join(body.sentence)
        if len(sentence) > 40 * limits.words:
            raise InputError(f"sentence: {len(sentence)} characters, at most {40 * limits.words}")
        words = self.vocab.encode(sentence)
        if len(words) > limits.words:
            raise InputError(f"sentence: {len(words)} words, expected at most {limits.words}")
        caption = {"captions": torch.tensor(words)}  # (W,)
        if system == "gsmn" and self.opt.is_sparse:
            pairs = body.dependencies
            if pairs is None or not all(0 <= x < len(words) for pair in pairs for x in pair):
                raise InputError(
                    "dependencies: this model needs them, [governor, dependent] from 0 (<start>) "
                    f"to {len(words) - 1} (<end>), the root's first"
                )
            pairs = torch.tensor(pairs[1:], dtype=torch.long).view(-1, 2)
            caption["adjacency"] = adjacency(len(words), pairs)  # (W, W)
        if len(body.boxes) > limits.images:
            raise InputError(f"boxes: {len(body.boxes)} images, expected at most {limits.images}")
        whole = body.whole_items
        if system == "pfan_whole" and (whole is None or len(whole) != len(body.boxes)):
            found = "none" if whole is None else len(whole)
            raise InputError(f"whole_items: {found}, expected one for each of the boxes")
        images = []
        for place, record in enumerate(body.boxes):
            item = self.image_item(record, f"boxes.{place}")
            if system == "pfan_whole":
                if len(whole[place]) != self.opt.img_dim:
                    raise InputError(
                        f"whole_items.{place}: {len(whole[place])} numbers, expected "
                        f"{self.opt.img_dim}"
                    )
                item["whole"] = torch.tensor(whole[place])  # (F,)
            images.append(item)
        return Query(caption, images)

    def image_item(self, record: Record, where: str) -> dict[str, Tensor]:
        """What the dataset of the model's system reads of an image."""
        n, opt = record.num_boxes, self.opt
        if n > self.limits.regions:
            raise InputError(f"{where}: {n} regions, expected at most {self.limits.regions}")
        boxes = decode(record.boxes, 4, n, where, "boxes")  # (R, 4)
        features = decode(record.features, opt.img_dim, n, where, "features")  # (R, F)
        item = {"images": torch.from_numpy(features.copy())}
        if opt.model == "gsmn":
            size = torch.tensor([record.image_w, record.image_h] * 2)  # (4,)
            item["boxes"] = torch.from_numpy(boxes.copy()) / size  # (R, 4)
        elif opt.model in ("pfan", "pfan_whole"):
            if opt.model == "pfan_whole" and opt.need_box_whole:
                boxes = boxes[:-1]  # the last region is the whole image
                if not len(boxes):
                    raise InputError(f"{where}: one region; the last one is the whole image")
            size = [[record.image_w, record.image_h]]
            found = find_blocks(boxes[None], size, opt.split_size, opt.n_blocks)[0]  # (R, 2 K)
            found = torch.from_numpy(found)
            ids, overlap = found.chunk(2, 1)  # (R, K)
            item |= {"blocks": ids.long(), "overlap": overlap.contiguous()}
        return item

    @torch.inference_mode()
    def score(self, queries: list[Query]) -> list[dict[str, list[float]]]:
        """What each query is answered: encoded together, scored each by itself."""
        items = [item for query in queries for item in query.images]
        by_regions = defaultdict(list)
        for place, item in enumerate(items):
            by_regions[len(item["images"])].append(place)
        images: list[dict[str, Tensor]] = [{}] * len(items)
        for places in by_regions.values():
            for start in range(0, len(places), self.limits.batch):
                some = places[start : start + self.limits.batch]
                batch = to_device(collate_fn([items[place] for place in some]), self.device)
                encoded = self.model.encode_images(batch)
                for row, place in enumerate(some):
                    images[place] = {name: x[row] for name, x in encoded.items()}
        batch = collate_fn([query.caption for query in queries])
        captions = self.model.encode_captions(to_device(batch, self.device))
        answers, start = [], 0
        for row, query in enumerate(queries):
            end = start + len(query.images)
            caption = {name: x[row : row + 1] for name, x in captions.items()}
            answers.append(self.score_one(images[start:end], caption))
            start = end
        return answers

    def score_one(
        self, images: list[dict[str, Tensor]], caption: dict[str, Tensor]
    ) -> dict[str, list[float]]:
        """Scores of encoded images with one encoded caption, in both directions."""
        by_regions = defaultdict(list)
        for place, image in enumerate(images):
            by_regions[len(image["regions"])].append(place)
        answer = {f"sim_{direction}": [0.0] * len(images) for direction in DIRECTIONS}
        for places in by_regions.values():
            some = {
                name: torch.stack([images[place][name] for place in places])
                for name in images[places[0]]
            }
            for direction in DIRECTIONS:
                # GSMN has one score, of both directions.
                way = (direction,) if isinstance(self.model, SCAN) else ()
                scores = self.model.similarity(some, caption, *way)  # (n, 1)
                for place, score in zip(places, scores[:, 0].tolist(), strict=True):
                    answer[f"sim_{direction}"][place] = score
        return answer


class Desk:
    """Takes requests in, hands them to the scorer in batches, and keeps within the limits."""

    def __init__(self, scorer: Scorer):
        self.scorer, self.limits = scorer, scorer.limits
        self.inside = self.held = self.answered = 0
        self.queue: asyncio.Queue[tuple[Query, asyncio.Future]] = asyncio.Queue()
        self.reader = ThreadPoolExecutor(1, "read")
        self.worker = ThreadPoolExecutor(1, "score")

    async def answer(self, request: Request) -> dict[str, list[float]]:
        """The scores that a request asks for. Raises Refused."""
        if self.inside >= self.limits.waiting:
            raise Refused(503, f"{self.inside} requests are waiting already; try again")
        self.inside += 1
        kept = 0
        try:
            raw = bytearray()
            try:
                async with asyncio.timeout(self.limits.seconds):
                    async for chunk in self.chunks(request):
                        self.held += len(chunk)
                        kept += len(chunk)
                        if self.held > self.limits.held_bytes:
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
            self.inside -= 1
            self.held -= kept

    async def scores(self, raw: bytearray) -> dict[str, list[float]]:
        """Read a body and wait for its turn. Cancelled, it is not scored."""
        loop = asyncio.get_running_loop()
        query = await loop.run_in_executor(self.reader, self.scorer.read, raw)
        future = loop.create_future()
        self.queue.put_nowait((query, future))
        return await future

    async def disconnected(self, request: Request) -> None:
        """Return when the client has gone; its body has been read."""
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def drain(self, request: Request) -> None:
        """Read and drop what a refused client still sends, within bounds.

        A client that is cut off while it sends sees the connection break instead of the answer.
        """
        left = self.limits.drained_bytes
        with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # read to its end already
            async with asyncio.timeout(self.limits.drain_seconds):
                stream, chunk = request.stream(), b""
                while left > 0 and chunk is not None:
                    async with asyncio.timeout(1):
                        chunk = await anext(stream, None)
                    left -= len(chunk or b"")

    async def chunks(self, request: Request):
        """A body as it comes, up to the limit: 413 past it, at once where its length is told."""
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
        """Score what waits, as one batch after the other."""
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
            except Exception as error:  # no thread to be had; the next batch may have one
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def score(self, queries: list[Query]) -> list:
        """Answers, or what went wrong: a request that fails does not fail its neighbours."""
        if not queries:
            return []
        try:
            return self.scorer.score(queries)
        except Exception as error:
            if len(queries) == 1:
                return [error]
            return [self.score([query])[0] for query in queries]


def build_app(scorer: Scorer, name: str) -> FastAPI:
    """The application; `name` is what /health says of the checkpoint."""
    desk = Desk(scorer)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        work = asyncio.create_task(desk.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        desk.reader.shutdown()
        desk.worker.shutdown()

    app = FastAPI(title="Image-text matching scores", lifespan=lifespan)
    schema = Body.model_json_schema(ref_template="#/components/schemas/{model}")
    records = schema.pop("$defs")
    described = {"content": {"application/json": {"schema": schema}}, "required": True}

    @app.post(
        "/scan_sentence_image_score",
        response_model=Scores,
        openapi_extra={"requestBody": described},
        responses={
            status: {"description": what}
            for status, what in {
                408: "the body came too slowly",
                413: "the body is too large",
                415: "not application/json",
                422: "what is wrong with the body",
                503: "too many requests at once",
                504: "not scored in time",
            }.items()
        },
    )
    async def scan_sentence_image_score(request: Request):
        """Score a sentence with each of some images, in both directions."""
        try:
            return JSONResponse(await desk.answer(request))
        except Refused as refused:
            if refused.status in (413, 415, 503) and "expect" not in request.headers:
                await desk.drain(request)
            # What is left of a body that was not read would be taken for the next request.
            headers = {"connection": "close"} if refused.status in (408, 413, 415, 503) else None
            return JSONResponse({"error": str(refused)}, refused.status, headers)
        except ClientDisconnect:
            return JSONResponse({"error": "the client is gone"}, 499)

    @app.get("/health")
    async def health():
        """Whether the server answers, and what it serves."""
        return {
            "status": "ok",
            "model": scorer.opt.model,
            "checkpoint": name,
            "waiting": desk.inside,
            "answered": desk.answered,
        }

    plain = app.openapi

    def openapi() -> dict:
        described = plain()
        described.setdefault("components", {}).setdefault("schemas", {}).update(records)
        return described

    app.openapi = openapi
    return app


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Serve the scores of a checkpoint over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="any model of this project, or published")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from outside")
    parser.add_argument("--port", type=int, default=PORT, help="0: any that is free")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    default = Limits()
    parser.add_argument(
        "--max_body_mb", type=float, default=default.body_bytes / 2**20, help="a request"
    )
    parser.add_argument("--max_images", type=int, default=default.images, help="a request")
    parser.add_argument("--max_waiting", type=int, default=default.waiting, help="requests")
    parser.add_argument("--timeout", type=float, default=default.seconds, help="seconds")
    opt = parser.parse_args(argv)
    given = opt.max_body_mb, opt.max_images, opt.max_waiting, opt.timeout
    if not all(0 < number < math.inf for number in given):
        raise InputError("--max_body_mb, --max_images, --max_waiting, --timeout: expected above 0")
    limits = default._replace(
        body_bytes=int(opt.max_body_mb * 2**20),
        images=opt.max_images,
        waiting=opt.max_waiting,
        seconds=opt.timeout,
    )
    limits = limits._replace(held_bytes=max(limits.held_bytes, limits.body_bytes))
    scorer = Scorer(opt.checkpoint, opt.vocab_path, pick_device(opt.device), limits)
    app = build_app(scorer, os.path.basename(opt.checkpoint))
    config = uvicorn.Config(
        app,
        host=opt.host,
        port=opt.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(2 * limits.seconds) + 5,
        limit_concurrency=1024,
    )
    server = uvicorn.Server(config)

    def stop(*_) -> None:
        server.should_exit = True

    # Before uvicorn has its own handlers, and after: it raises the signal that stopped it once
    # more when it is done, and an end in good order should not look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Told that this is TCP, asyncio sends each part of a reply at once.
    family = socket.AF_INET6 if ":" in opt.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((opt.host, opt.port))
        sock.listen(config.backlog)  # who reads the next line may connect at once
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {opt.host} --port {opt.port}: {error}") from None
    host, port = sock.getsockname()[:2]
    print(f"serving {scorer.opt.model} at http://{host}:{port} (described at /docs)", flush=True)
    server.run(sockets=[sock])
    print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
