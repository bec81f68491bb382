"""Serve the scores of a checkpoint over HTTP, and a page that searches data, until it is stopped.

    pip install fastapi uvicorn
    python serve.py runs/x/model_best.pth.tar                # http://127.0.0.1:5091
    python serve.py runs/x/model_best.pth.tar --data_path data --split test     # with the page
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
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress

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
    from starlette.requests import ClientDisconnect

    import serve_finder
    from serve_schema import MOST, Body, Record, Scores, parse_body
    from serve_search import SearchLimits, SearchRoutes, add_start
    from util.connections import configure, fitting_limits, open_socket
    from util.request_batcher import Limits, Query, RequestBatcher
    from util.request_bodies import FewAtOnce, Refused
    from util.senders import OwnNamesOnly, Senders
except ImportError as error:
    message = f"serve.py needs {error.name}, which is not installed: pip install fastapi uvicorn"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message) from None

PORT = 5091  # as the published server
DIRECTIONS = ("t2i", "i2t")


class Scorer:
    """Converts requests to batches and scores them with a model."""

    def __init__(
        self,
        path: str,
        vocab_path: str | None,
        device: torch.device,
        limits: Limits,
        loaded: tuple | None = None,
    ):
        """`loaded` is what ckpt.load_model gives, if that was done before."""
        self.model, self.vocab, self.opt = loaded or ckpt.load_model(path, vocab_path, device)
        self.model.eval()
        if self.opt.text_enc_type == "bert":
            room = self.opt.bert_config["max_position_embeddings"]
            limits = limits._replace(words=min(limits.words, room))
        self.device, self.limits = device, limits
        self.vocab.encode("a word")  # if a tokenizer lacks data, fail before the first request

    def read(self, raw: bytes | bytearray) -> Query:
        """Check the body of a request, and convert it. Raises Refused."""
        images, fields = self.limits.images, self.limits.fields
        values = images * (self.opt.img_dim + fields) + 2 * MOST  # one list too long is named
        try:
            return self.query(parse_body(raw, values, images * fields + 2**14))
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
    403: "the host is no name of this server",
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


def lifespan(batcher: RequestBatcher, search: SearchRoutes | None) -> Callable:
    """What FastAPI runs the application in: the batcher works meanwhile."""

    @asynccontextmanager
    async def run_batcher(app: FastAPI):
        work = asyncio.create_task(batcher.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        batcher.reader.shutdown()
        batcher.worker.shutdown()
        if search is not None:
            search.close()

    return run_batcher


def build_app(
    scorer: Scorer,
    name: str,
    finder: serve_finder.Finder | None = None,
    search_limits: SearchLimits | None = None,
    hosts: tuple[str, ...] = (),
    own_machine: bool = False,
) -> FastAPI:
    """The application; /health reports `name` as the checkpoint.

    `finder` holds what the search page searches, if there is one; `hosts` are the server's names;
    `own_machine`: it serves this machine only.
    """
    batcher, search, senders = RequestBatcher(scorer), None, Senders(hosts)
    if finder is not None:
        search = SearchRoutes(finder, batcher, search_limits or SearchLimits(), senders)
    app = FastAPI(title="Image-text matching scores", lifespan=lifespan(batcher, search))
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
            if refused.status in (413, 415, 503):
                await batcher.bodies.drain(request)
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

    app.add_middleware(FewAtOnce)
    if own_machine:
        app.add_middleware(OwnNamesOnly, senders=senders)
    add_schemas(app, records)
    if search is None:
        add_start(app, name, scorer.opt.data_name)
    else:
        search.add(app)
    return app


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Limits]:
    """The flags, and the limits that they set. Raises InputError on limits that do not fit."""
    parser = Parser(
        description="Serve the scores of a checkpoint over HTTP, and a page that searches data.",
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
    serve_finder.add_flags(parser)
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


def open_app(opt: argparse.Namespace, limits: Limits) -> tuple[FastAPI, Scorer]:
    """The application that the flags describe; with --data_path it searches that data."""
    device, loaded = pick_device(opt.device), None
    finder = serve_finder.open_finder(opt, device)
    if finder is not None:  # one model for both
        searcher = finder.searcher
        loaded = searcher.model, searcher.vocab, searcher.opt
    scorer = Scorer(opt.checkpoint, opt.vocab_path, device, limits, loaded)
    more = SearchLimits(
        upload_bytes=int(opt.max_upload_mb * 2**20), waiting=limits.waiting, seconds=limits.seconds
    )
    hosts = tuple(name for name in (opt.host, opt.public_host, socket.gethostname()) if name)
    name, own = os.path.basename(opt.checkpoint), serve_finder.is_own_machine(opt.host)
    return build_app(scorer, name, finder, more, hosts, own), scorer


def main(argv: list[str] | None = None) -> None:
    opt, limits = parse(argv)
    app, scorer = open_app(opt, limits)
    config = configure(app, int(2 * limits.seconds) + 5, fitting_limits())
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
