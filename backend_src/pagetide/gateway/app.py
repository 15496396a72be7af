"""The OpenAI API over Triton: routes and errors.

What happens behind the routes is in service.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response

from pagetide.gateway.bodies import ChatBody, CompletionBody, DetokenizeBody, ResponsesBody, TokenizeBody
from pagetide.gateway.door import Door, Rules
from pagetide.gateway.errors import ApiError, failed, refused
from pagetide.gateway.fields import prompt_to_tokenize
from pagetide.gateway.page import Page, controls
from pagetide.gateway.service import Gateway
from pagetide.gateway.spans import Spans
from pagetide.gateway.status import Status
from pagetide.gateway.triton import Triton

log = logging.getLogger("pagetide.gateway")


def make_app(
    urls: list[str],
    rules: Rules,
    call_format: str = "",
    metrics: Sequence[str] = (),
    admin_token: str = "",
    traces: str = "",
    lora_dir: Path | None = None,
) -> FastAPI:
    """The application, as an ASGI server runs it. urls: the gRPC addresses of Tritons; metrics: those of
    their metrics; traces: of a collector of spans; lora_dir: as Models takes it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # gRPC's channels belong to the event loop that runs by now.
        triton = Triton(urls, admin_token)
        app.state.gateway = Gateway(triton, call_format, lora_dir)
        await triton.servers.look_up()
        watches = (triton.servers.watch(), app.state.gateway.health.watch())
        watching = [asyncio.ensure_future(watch) for watch in watches]
        yield
        for one in watching:
            one.cancel()
        await triton.close()

    app = FastAPI(title="Pagetide", lifespan=lifespan)
    _add_errors(app)
    _add_routes(app)
    _add_page(app, Status(metrics))
    app.add_middleware(Door, rules=rules)
    app.add_middleware(Spans, endpoint=traces)
    return app


def _add_routes(app: FastAPI) -> None:
    def gateway() -> Gateway:
        return app.state.gateway

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await gateway().chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await gateway().complete(body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        return await gateway().respond(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = await gateway().models.names()
        adapters = [_model(name, parent=names[0]) for name in gateway().models.adapters()]
        return {"object": "list", "data": [*map(_model, names), *adapters]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        chosen = await gateway().models.choose(name)
        return _model(chosen.shown, chosen.triton if chosen.lora_name else None)

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ApiError(404, "none of the models makes embeddings", "model", "model_not_found")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        model = (await gateway().models.choose(body.model)).triton
        tokens = await gateway().triton.tokenize(model, prompt_to_tokenize(body))
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        model = (await gateway().models.choose(body.model)).triton
        return {"prompt": await gateway().triton.detokenize(model, body.tokens)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if not gateway().health.is_good:
            raise ApiError(503, gateway().health.reason)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, status: Status) -> None:
    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/playground/")

    @app.get("/fields")
    async def fields() -> list[dict[str, Any]]:
        return controls()

    @app.get("/status")
    async def now() -> dict[str, float]:
        return await status.now()

    app.mount("/playground", Page())


def _model(name: str, parent: str | None = None) -> dict[str, Any]:
    """parent: the model that an adapter belongs to."""
    described = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "pagetide"}
    return described | ({"parent": parent} if parent else {})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; the API is described at /docs"
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return failed().response()


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refused(f"the body is not valid JSON: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"][:1].lower() + first["msg"][1:]
    # Of a union's parts only the field is worth naming.
    name = place[0] if place else "body"
    where = ".".join(part for part in place if not part.startswith(("function-", "list[", "constrained")))
    return ApiError(422, f"{where or name}: {message}", name)
