"""Serve the scores of a checkpoint over HTTP, until the server is stopped.

    pip install fastapi uvicorn
    python serve.py runs/x/model_best.pth.tar                # http://127.0.0.1:5091
    curl http://127.0.0.1:5091/health                        # the API is described at /docs

POST /scan_sentence_image_score takes {"sentence": [words], "boxes": [bottom-up-attention records],
"whole_items": [one vector per image]} and answers {"sim_t2i": [one score per image], "sim_i2t":
[...]}: the scores that evaluation.py computes, in both directions. The server keeps nothing between
requests, and writes nothing to disk (Q34). util/request_batcher.py holds the queue and the limits.

Shapes: R regions, F numbers per region, W words.
"""

import argparse
import asyncio
import math
import os
import signal
import socket
import sys
import threading
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import torch
from torch import Tensor

import checkpoint as ckpt
import systems
from data import collate_fn, without_filling
from pairs import Encoding
from system import ServedImage
from util.arguments import Parser
from util.cli import InputError, run
from util.convert_data import decode
from util.devices import pick_device, to_device

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, FailFast, Field, FiniteFloat, ValidationError
    from starlette.requests import ClientDisconnect

    from util.request_batcher import Limits, Query, Refused, RequestBatcher
except ImportError as error:
    message = f"serve.py needs {error.name}, which is not installed: pip install fastapi uvicorn"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from None

PORT = 5091  # as the published server
DIRECTIONS = ("t2i", "i2t")


# A list is refused at its first fault, or if it is too long: a report of all faults would be many
# times larger than the body.
MOST = 2**16
FEW = FailFast(), Field(min_length=1, max_length=MOST)


class Record(BaseModel):
    """An image, as in a tsv file of bottom-up-attention; other fields are ignored."""

    image_id: int | str | None = None
    image_w: Annotated[FiniteFloat, Field(gt=0, description="width in pixels")]
    image_h: Annotated[FiniteFloat, Field(gt=0, description="height in pixels")]
    num_boxes: Annotated[int, Field(ge=1, le=10**6, description="number of regions, R")]
    boxes: Annotated[str, Field(description="base64 of float32 (R, 4): left, top, right, bottom")]
    features: Annotated[str, Field(description="base64 of float32 (R, F)")]


class Body(BaseModel):
    """A sentence and the images to score it with; other fields are ignored."""

    sentence: Annotated[list[str], *FEW, Field(description="the words")]
    boxes: Annotated[list[Record], *FEW, Field(description="one record per image")]
    whole_items: Annotated[
        list[Annotated[list[FiniteFloat], *FEW]],
        *FEW,
        Field(description="for pfan_whole: one vector (F,) per image"),
    ] = None
    dependencies: Annotated[
        list[tuple[int, int]],
        *FEW,
        Field(description="for a sparse GSMN: [governor, dependent], <start> is 0, the root first"),
    ] = None


class Scores(BaseModel):
    """One score per image, in the order of the request, in each direction."""

    sim_t2i: list[float]
    sim_i2t: list[float]


def explain(error: ValidationError) -> str:
    """The first three faults of a body, each with its place."""
    said = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        place = ".".join(map(str, fault["loc"]))
        said.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return "; ".join(said)


class Scorer:
    """Converts requests to batches and scores them with a model."""

    def __init__(self, path: str, vocab_path: str | None, device: torch.device, limits: Limits):
        self.model, self.vocab, self.opt = ckpt.load_model(path, vocab_path, device)
        self.model.eval()
        if self.opt.text_enc_type == "bert":
            room = self.opt.bert_config["max_position_embeddings"]
            limits = limits._replace(words=min(limits.words, room))
        self.device, self.limits = device, limits
        self.vocab.encode("a word")  # if a tokenizer lacks data, fail before the first request

    def read(self, raw: bytes | bytearray) -> Query:
        """Check the body of a request, and convert it. Raises Refused."""
        try:
            body = Body.model_validate_json(raw)
        except ValidationError as error:
            raise Refused(422, explain(error)) from None
        try:
            return self.query(body)
        except InputError as error:
            raise Refused(422, str(error)) from None

    def query(self, body: Body) -> Query:
        """Convert a body to tensors. Raises InputError if a part does not fit."""
        limits, system = self.limits, systems.of(self.opt)
        sentence = " ".join(body.sentence)
        if len(sentence) > 40 * limits.words:
            raise InputError(f"sentence: {len(sentence)} characters, at most {40 * limits.words}")
        words = self.vocab.encode(sentence)
        if len(words) > limits.words:
            raise InputError(f"sentence: {len(words)} words, expected at most {limits.words}")
        caption = system.request_caption(words, body.dependencies, self.opt)
        if len(body.boxes) > limits.images:
            raise InputError(f"boxes: {len(body.boxes)} images, expected at most {limits.images}")
        whole = self.read_whole(body) if system.reads_whole else [None] * len(body.boxes)
        images = []
        for place, (record, vector) in enumerate(zip(body.boxes, whole, strict=True)):
            image = self.read_image(record, vector, f"boxes.{place}")
            try:
                images.append(system.request_image(image, self.opt))
            except InputError as error:
                raise InputError(f"boxes.{place}: {error}") from None
        return Query(caption, images)

    def read_whole(self, body: Body) -> list[Tensor]:
        """The vectors of the whole images, (F,) each."""
        whole = body.whole_items
        if whole is None or len(whole) != len(body.boxes):
            found = "none" if whole is None else len(whole)
            raise InputError(f"whole_items: {found}, expected one for each of the boxes")
        for place, vector in enumerate(whole):
            if len(vector) != self.opt.img_dim:
                raise InputError(
                    f"whole_items.{place}: {len(vector)} numbers, expected {self.opt.img_dim}"
                )
        return [torch.tensor(vector) for vector in whole]

    def read_image(self, record: Record, whole: Tensor | None, where: str) -> ServedImage:
        """Decode an image from a request."""
        n = record.num_boxes
        if n > self.limits.regions:
            raise InputError(f"{where}: {n} regions, expected at most {self.limits.regions}")
        boxes = decode(record.boxes, 4, n, where, "boxes")  # (R, 4)
        features = decode(record.features, self.opt.img_dim, n, where, "features")  # (R, F)
        size = record.image_w, record.image_h
        kept = range(n)
        if not self.opt.keep_empty_regions:
            kept = without_filling(features, systems.of(self.opt).last_region_is_image(self.opt))
        arrays = (torch.from_numpy(x[list(kept)]) for x in (features, boxes))
        return ServedImage(*arrays, size, whole)

    @torch.inference_mode()
    def score(self, queries: list[Query]) -> list[dict[str, list[float]]]:
        """The answer to each query. All queries are encoded together; each is scored alone."""
        items = [item for query in queries for item in query.images]
        by_regions = defaultdict(list)
        for place, item in enumerate(items):
            by_regions[len(item["images"])].append(place)
        images: list[Encoding] = [{}] * len(items)
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

    def score_one(self, images: list[Encoding], caption: Encoding) -> dict[str, list[float]]:
        """Scores of encoded images with one encoded caption, in both directions."""
        by_shape = defaultdict(list)
        for place, image in enumerate(images):
            shapes = tuple((name, x.shape) for name, x in image.items())
            by_shape[shapes].append(place)
        directions = systems.of(self.opt).directions
        answer = {f"sim_{direction}": [0.0] * len(images) for direction in DIRECTIONS}
        for places in by_shape.values():
            some = {
                name: torch.stack([images[place][name] for place in places])
                for name in images[places[0]]
            }
            for direction in DIRECTIONS:
                # GSMN and CHAN have one score for both directions.
                way = (direction,) if direction in directions else ()
                scores = self.model.similarity(some, caption, *way)  # (n, 1)
                for place, score in zip(places, scores[:, 0].tolist(), strict=True):
                    answer[f"sim_{direction}"][place] = score
        return answer


RESPONSES = {
    408: "the body came too slowly",
    413: "the body is too large",
    415: "not application/json",
    422: "the body does not fit",
    503: "too many requests at once",
    504: "not scored in time",
}


def add_schemas(app: FastAPI, schemas: dict) -> None:
    """Add the schemas that the schema of a body refers to, in the description of the API."""
    plain = app.openapi

    def openapi() -> dict:
        described = plain()
        described.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return described

    app.openapi = openapi


def build_app(scorer: Scorer, name: str) -> FastAPI:
    """The application; /health reports `name` as the checkpoint."""
    batcher = RequestBatcher(scorer)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        work = asyncio.create_task(batcher.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        batcher.reader.shutdown()
        batcher.worker.shutdown()

    app = FastAPI(title="Image-text matching scores", lifespan=lifespan)
    schema = Body.model_json_schema(ref_template="#/components/schemas/{model}")
    records = schema.pop("$defs")
    described = {"content": {"application/json": {"schema": schema}}, "required": True}

    @app.post(
        "/scan_sentence_image_score",
        response_model=Scores,
        openapi_extra={"requestBody": described},
        responses={status: {"description": what} for status, what in RESPONSES.items()},
    )
    async def scan_sentence_image_score(request: Request):
        """Score a sentence with each image, in both directions."""
        try:
            return JSONResponse(await batcher.answer(request))
        except Refused as refused:
            if refused.status in (413, 415, 503) and "expect" not in request.headers:
                await batcher.drain(request)
            # Else the unread rest of a body would be taken for the next request.
            headers = {"connection": "close"} if refused.status in (408, 413, 415, 503) else None
            return JSONResponse({"error": str(refused)}, refused.status, headers)
        except ClientDisconnect:
            return JSONResponse({"error": "the client is gone"}, 499)

    @app.get("/health")
    async def health():
        """Report that the server runs, and which checkpoint it serves."""
        return {
            "status": "ok",
            "model": scorer.opt.model,
            "checkpoint": name,
            "waiting": batcher.in_flight,
            "answered": batcher.answered,
        }

    add_schemas(app, records)
    return app


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


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Limits]:
    """The flags, and the limits that they set. Raises InputError on limits that do not fit."""
    parser = Parser(
        description="Serve the scores of a checkpoint over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=os.path.expanduser,
        help="a checkpoint of this project, or a published one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines can reach it")
    parser.add_argument("--port", type=int, default=PORT, help="0: any free port")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    default = Limits()
    parser.add_argument(
        "--max_body_mb", type=float, default=default.body_bytes / 2**20, help="MiB per request"
    )
    parser.add_argument("--max_images", type=int, default=default.images, help="images per request")
    parser.add_argument(
        "--max_waiting", type=int, default=default.waiting, help="requests at a time"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=default.seconds,
        help="seconds to send a body, and again for the reply",
    )
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
    return opt, limits._replace(held_bytes=max(limits.held_bytes, limits.body_bytes))


def main(argv: list[str] | None = None) -> None:
    opt, limits = parse(argv)
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

    # These handlers act before uvicorn sets its own, and after it. When uvicorn has stopped, it
    # raises the signal again; without them, a normal stop would look like a crash.
    if threading.current_thread() is threading.main_thread():  # others may not set any
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
    # It listens already: a reader of the next line may connect at once.
    sock = open_socket(opt.host, opt.port, config.backlog)
    host, port = sock.getsockname()[:2]
    print(f"serving {scorer.opt.model} at http://{host}:{port} (described at /docs)", flush=True)
    server.run(sockets=[sock])
    print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
