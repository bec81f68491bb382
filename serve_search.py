"""The search of serve.py: a page, and the routes that it asks.

    python serve.py runs/x/model_best.pth.tar --data_path data --data_name demo_precomp --split test

    GET  /                        the page (util/search_page)
    GET  /api/info                what there is to search, and within which limits
    POST /api/search              {"query": sentence} -> images, best first
    GET  /api/captions?image=3    captions of the data set for one of its images, best first
    POST /api/attention           {"query": sentence, "images": [3]} -> weights of words and regions
    POST /api/upload              the bytes of a picture -> captions, best first
    GET  /photos/3                the photo of an image, as a JPEG of at most 1,000 pixels a side

serve_finder.py computes the answers. Here is who may ask, how much, and how long it may take. One
thread does all work of the model, that of serve.py included.
"""

import asyncio
import base64
import hashlib
import html
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_finder import Finder, NoSuchImage
from serve_schema import AttentionOf, CaptionSearch, ImageSearch, Ranking, explain
from util.cli import InputError
from util.request_batcher import RequestBatcher
from util.request_bodies import Refused, Turns, unless_gone
from util.senders import Senders, host_name  # noqa: F401 (a name that this module had)
from util.uploads import Unavailable

PAGE = Path(__file__).parent / "util" / "search_page"
JSON = "application/json"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # another data set may be served at the same address tomorrow
}
UNREAD = (403, 408, 413, 415, 503)  # statuses of requests whose body may not have been read
RESPONSES = {
    403: {"description": "from a page of another site"},
    404: {"description": "no such image, or no uploads"},
    408: {"description": "the body came too slowly"},
    413: {"description": "the body is too large"},
    415: {"description": "another content-type is expected"},
    422: {"description": "the request does not fit, or the picture cannot be read"},
    503: {"description": "too many requests at once"},
    504: {"description": "no answer in time"},
}


# How the routes are described


def in_body(schema: type[BaseModel]) -> dict:
    """A body of a schema."""
    return {"requestBody": {"content": {JSON: {"schema": schema.model_json_schema()}}}}


def in_query(schema: type[BaseModel]) -> dict:
    """The fields of a schema in the address."""
    described = schema.model_json_schema()
    required = described.get("required", ())
    fields = described["properties"].items()
    return {
        "parameters": [
            {"name": name, "in": "query", "required": name in required, "schema": field}
            for name, field in fields
        ]
    }


PICTURE = {"schema": {"type": "string", "format": "binary"}}
UPLOAD = in_query(Ranking) | {"requestBody": {"content": {"image/jpeg": PICTURE}}}
PHOTO = {
    "parameters": [
        {"name": "number", "in": "path", "required": True, "schema": {"type": "integer"}}
    ],
    "responses": {"200": {"content": {"image/jpeg": PICTURE}}},
}


class SearchLimits(NamedTuple):
    """The limits of one request, and of all requests together."""

    body_bytes: int = 64 * 2**10
    upload_bytes: int = 10 * 2**20
    waiting: int = 32  # requests in progress at a time
    seconds: float = 30.0  # to send a body, and again for the reply


# Over HTTP


def asked_for(schema: type[BaseModel], request: Request, raw: bytes | None = None) -> BaseModel:
    """What a request asks for, in its body or else in its address. Raises Refused."""
    try:
        if raw is not None:
            return schema.model_validate_json(raw)
        return schema.model_validate_strings(dict(request.query_params))
    except ValidationError as error:
        raise Refused(422, explain(error)) from None


class SearchRoutes:
    """The routes: who may ask, how much, and how long it may take."""

    def __init__(
        self,
        finder: Finder,
        batcher: RequestBatcher,
        limits: SearchLimits,
        senders: Senders,
    ):
        self.finder, self.batcher, self.limits, self.senders = finder, batcher, limits, senders
        self.photo_readers = ThreadPoolExecutor(2, "photos")
        self.upload_reader = ThreadPoolExecutor(1, "uploads")
        self.turns: dict[ThreadPoolExecutor, asyncio.Semaphore] = {
            self.photo_readers: asyncio.Semaphore(2),
            self.upload_reader: asyncio.Semaphore(1),
            batcher.worker: asyncio.Semaphore(1),
        }
        self.unread: set[str] = set()  # photos of which it was said that they cannot be read

    def close(self) -> None:
        self.finder.close()
        self.photo_readers.shutdown()
        self.upload_reader.shutdown()

    def add(self, app: FastAPI) -> None:
        """Add the page and its routes to the application."""
        add_pages(app, build_page("page"))
        body_bytes, upload_bytes = self.limits.body_bytes, self.limits.upload_bytes
        for method, path, handler, kind, most, described in (
            ("GET", "/api/info", self.info, None, 0, {}),
            ("POST", "/api/search", self.search, JSON, body_bytes, in_body(ImageSearch)),
            ("GET", "/api/captions", self.captions, None, 0, in_query(CaptionSearch)),
            ("POST", "/api/attention", self.attention, JSON, body_bytes, in_body(AttentionOf)),
            ("POST", "/api/upload", self.upload, "image/*", upload_bytes, UPLOAD),
            ("GET", "/photos/{number}", self.photo, None, 0, PHOTO),
        ):
            app.add_api_route(
                path,
                self.guarded(handler, kind, most),
                methods=[method],
                name=handler.__name__,
                description=handler.__doc__,
                responses=RESPONSES,
                openapi_extra=described,
            )

    def guarded(self, handler: Callable, kind: str | None, most: int) -> Callable:
        """A route: what the handler gives, or {"error": one line} with a status.

        The handler gets the request and its body: of a content-type `kind` and at most `most`
        bytes, or none. Each route has its own turns: a slow one blocks no other.
        """
        turns, seconds = Turns(self.limits.waiting), self.limits.seconds

        async def route(request: Request):
            try:
                self.senders.check(request.headers)
                turns.place_for(request)  # if there is none, its body need not come
                body = nullcontext(b"")
                if kind is not None:
                    body = self.batcher.bodies.read(request, kind, most, seconds)
                async with body as raw, turns.take(request, seconds):
                    answer = await unless_gone(request, handler(request, raw))
                if not isinstance(answer, Response):
                    answer = JSONResponse(answer, 200, HEADERS)
                return answer
            except Refused as refused:
                status, said = refused.status, str(refused)
            except Unavailable as error:
                status, said = 503, str(error)
            except NoSuchImage as error:
                status, said = 404, str(error)
            except InputError as error:
                status, said = 422, str(error)
            except ClientDisconnect:
                status, said = 499, "the client is gone"
            headers = HEADERS
            if status in UNREAD:
                await self.batcher.bodies.drain(request)
                headers = HEADERS | {"connection": "close"}
            return JSONResponse({"error": said}, status, headers)

        return route

    async def in_turn(self, pool: ThreadPoolExecutor, work: Callable, *args):
        """What a function gives in a thread of a pool.

        No more calls are given to the pool than it has threads: the pool would keep the arguments
        of calls that nobody waits for any more, such as uploads.
        """
        loop, turn = asyncio.get_running_loop(), self.turns[pool]

        def ended(_) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(turn.release)

        await turn.acquire()
        job = pool.submit(work, *args)
        job.add_done_callback(ended)  # also if nobody waits for it any more
        return await asyncio.wrap_future(job)

    async def with_model(self, work: Callable, *args) -> dict:
        """What a function gives that uses the model: it waits for its turn."""
        return await self.in_turn(self.batcher.worker, work, *args)

    # The handlers

    async def info(self, request: Request, raw: bytes) -> dict:
        """What there is to search, and within which limits."""
        return self.finder.info | {"upload_bytes": self.limits.upload_bytes}

    async def search(self, request: Request, raw: bytes) -> dict:
        """Rank images for a sentence."""
        return await self.with_model(self.finder.find_images, asked_for(ImageSearch, request, raw))

    async def captions(self, request: Request, raw: bytes) -> dict:
        """Rank captions for an image of the data set: ?image=3, and optionally how to rank."""
        return await self.with_model(self.finder.find_captions, asked_for(CaptionSearch, request))

    async def attention(self, request: Request, raw: bytes) -> dict:
        """Tell which regions of images the words of a sentence attend to."""
        return await self.with_model(self.finder.look, asked_for(AttentionOf, request, raw))

    async def upload(self, request: Request, raw: bytes) -> dict:
        """Rank captions for a picture, the body: image/jpeg or alike."""
        if self.finder.no_uploads:
            raise Refused(404, self.finder.no_uploads)
        asked = asked_for(Ranking, request)
        pixels = await self.in_turn(self.upload_reader, self.finder.pictures.read, bytes(raw))
        return await self.with_model(self.finder.captions_of_picture, pixels, asked)

    async def photo(self, request: Request, raw: bytes) -> Response:
        """The photo of an image of the data set, as a JPEG."""
        text, photos = request.path_params["number"], self.finder.photos
        known = text.isascii() and text.isdecimal() and len(text) < 12 and int(text) < len(photos)
        if not known or photos[int(text)] is None:
            raise Refused(404, f"no photo of image {text[:12]!r}")
        try:
            data = await self.in_turn(self.photo_readers, self.finder.photo, int(text))
        except (InputError, OSError) as error:
            if text not in self.unread:  # not to the client: it names a folder here
                print(f"warning: {error}", flush=True)
                self.unread.add(text)
            raise Refused(404, f"the photo of image {text} cannot be read") from None
        return Response(data, 200, HEADERS, "image/jpeg")


# The page


def build_page(name: str, **texts: str) -> HTMLResponse:
    """A page of util/search_page as one file, which its headers forbid to load anything else.

    In it `{{name}}` stands for a text, which is escaped.
    """
    style, script = (PAGE / "page.css").read_text(), ""
    body = (PAGE / f"{name}.html").read_text(encoding="utf-8")
    for key, text in texts.items():
        body = body.replace("{{" + key + "}}", html.escape(text))
    if "{{script}}" in body:
        script = (PAGE / f"{name}.js").read_text(encoding="utf-8")
    body = body.replace("{{style}}", style).replace("{{script}}", script)

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' blob:; base-uri 'none'; "
        f"form-action 'self'; frame-ancestors 'none'; style-src 'sha256-{hashed(style)}'; "
        f"script-src 'sha256-{hashed(script)}'"
    )
    return HTMLResponse(body, 200, HEADERS | {"content-security-policy": policy})


def add_pages(app: FastAPI, page: HTMLResponse) -> None:
    """Add the page at /, its icon, and one-line errors where there is no route."""

    @app.get("/", include_in_schema=False)
    async def show_page():
        return page

    @app.get("/icon.svg", include_in_schema=False)
    async def show_icon():
        return Response((PAGE / "icon.svg").read_bytes(), 200, HEADERS, "image/svg+xml")

    @app.exception_handler(HTTPException)
    async def say(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def add_start(app: FastAPI, checkpoint: str, data_name: str) -> None:
    """Add a page that says how to start the server with data to search."""
    add_pages(app, build_page("start", checkpoint=checkpoint, data_name=data_name))
