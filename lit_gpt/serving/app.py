"""The routes: OpenAI's completions and chat, the models, health, metrics, and the page."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lit_gpt.errors import UserError
from lit_gpt.serving.catalog import Served
from lit_gpt.serving.completions import Completions
from lit_gpt.serving.errors import APIError
from lit_gpt.serving.requests import parse_json, read_name

PAGE = Path(__file__).with_name("page.html")
# The page may run its own script and speak to this server, and nothing else.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
Handler = Callable[[Request], Awaitable[Response]]


class App:
    """The server's application.

    Args:
        key: must come with each request, as a bearer token; None: none is asked for.
    """

    def __init__(self, completions: Completions, key: str | None) -> None:
        self.completions, self.catalog, self.metrics = completions, completions.catalog, completions.metrics
        self.key, self.created = key, int(time.time())

    def starlette(self) -> Starlette:
        """Return the application."""
        routes = [
            self.route("/", self.page, "GET", open_to_all=True),
            self.route("/health", self.health, "GET", open_to_all=True),
            self.route("/metrics", self.show_metrics, "GET"),
            self.route("/v1/models", self.models, "GET"),
            self.route("/v1/load_lora_adapter", self.load, "POST"),
            self.route("/v1/unload_lora_adapter", self.unload, "POST"),
            self.route("/v1/models/{name:path}", self.model, "GET"),
            self.route("/v1/chat/completions", partial(self.completions.answer, chat=True), "POST"),
            self.route("/v1/completions", partial(self.completions.answer, chat=False), "POST"),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: refuse_route, Exception: tell_failure})

    def route(self, path: str, handler: Handler, method: str, open_to_all: bool = False) -> Route:
        async def handle(request: Request) -> Response:
            try:
                if not open_to_all:
                    self.check_key(request)
                response = await handler(request)
            except APIError as error:
                response = JSONResponse(error.body(), error.status, error.headers)
            except UserError as error:  # a template's refusal of the messages, and the like
                response = JSONResponse(APIError(400, str(error)).body(), 400)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            self.metrics.requests[path, response.status_code] += 1
            return response

        return Route(path, handle, methods=[method])

    def check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is None:
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode()):
            raise APIError(401, "expected the server's API key as a bearer token", code="invalid_api_key")

    # what tells of the server

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_bytes(), headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        alive = self.completions.scheduler.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.text(self.completions.scheduler)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.describe(x) for x in self.catalog.served.values()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self.describe(self.catalog.find(request.path_params["name"])))

    # what comes and goes

    async def load(self, request: Request) -> Response:
        return JSONResponse(self.describe(await self.changed(request, self.catalog.load)))

    async def unload(self, request: Request) -> Response:
        return JSONResponse({"status": await self.changed(request, self.catalog.unload) or "unloaded"})

    async def changed(self, request: Request, change: Callable[[str], Any]) -> Any:
        """Change what is served by the name that a request gives, where files are read."""
        name = read_name(parse_json(await self.completions.read_body(request)))
        if self.catalog.adapters is None:
            raise APIError(404, "there are no LoRAs here; start without --finetuned_path", "lora_name")
        return await asyncio.wrap_future(self.catalog.adapters.reading.submit(change, name))

    def describe(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name, "object": "model", "created": self.created, "owned_by": "lit-gpt",
            "base": self.catalog.fingerprint, "method": served.method, "distance": served.distance,
            "max_model_len": self.completions.context,
        }  # fmt: skip


async def refuse_route(request: Request, error: Exception) -> Response:
    """Tell that there is no such route, or not by that method, as the API spells errors."""
    assert isinstance(error, HTTPException)
    return JSONResponse(APIError(error.status_code, error.detail).body(), error.status_code, error.headers)


async def tell_failure(request: Request, error: Exception) -> Response:
    """Tell that the server failed; its log says at what."""
    return JSONResponse(APIError(500, "the server failed at this request; its log says why").body(), 500)
