"""create_app: the routes of one server."""

from __future__ import annotations

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute as Upgrade

from inferneo.server.body import ClientGone, read_request
from inferneo.server.errors import ApiError, from_exception
from inferneo.server.page import load_page
from inferneo.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from inferneo.server.security import Gate, error_response
from inferneo.server.service import Service, make_service
from inferneo.server.settings import ServerSettings
from inferneo.server.sse import CompletionRoute
from inferneo.server.tokens import detokenize, tokenize
from inferneo.server.websocket import WebSocketRoute
from inferneo_core import AsyncEngine


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The ASGI application over an engine, which stays its owner's to close.

    Routes: POST and WebSocket at /v1/chat/completions and /v1/completions; GET /v1/models, /health and /metrics; POST
    /tokenize and /detokenize; GET / is the chat page. `app.state.service` is the Service behind them.
    """
    service = make_service(engine, settings)
    app = FastAPI(
        title="Inferneo",
        openapi_url=None,  # the requests are checked by hand, so what FastAPI would publish is not the API
        exception_handlers={
            HTTPException: _no_such_route,
            ApiError: _as_json,
            Exception: _as_json,
        },
    )
    app.state.service = service
    completions: tuple[tuple[str, type[ChatCompletionRequest | CompletionRequest]], ...] = (
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/completions", CompletionRequest),
    )
    for path, model in completions:
        app.router.routes.append(Route(path, CompletionRoute(service, path, model), methods=["POST"]))
        app.router.routes.append(Upgrade(path, WebSocketRoute(service, path, model)))
    _add_model_routes(app, service)
    _add_token_routes(app, service)
    _add_health_routes(app, service)
    if settings.show_ui:
        page = load_page()
        app.add_api_route("/", lambda: Response(page.html, headers=page.headers))
    app.add_middleware(Gate, settings=settings)
    if settings.allowed_origins:  # added last, so it comes first: a preflight request carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_model_routes(app: FastAPI, service: Service) -> None:
    cards = {
        name: {
            "id": name,
            "object": "model",
            "created": service.started_at,
            "owned_by": "inferneo",
            "max_model_len": service.engine.max_model_len,
        }
        for name in service.settings.served_model_names
    }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(cards.values())})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name not in cards:
            raise ApiError(
                404, f"there is no model {name!r}; this server has {', '.join(cards)}", code="model_not_found"
            )
        return JSONResponse(cards[name])


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize_route(request: Request) -> JSONResponse:
        asked = await read_request(TokenizeRequest, request.scope, request.receive, service.settings)
        return JSONResponse(await tokenize(service.engine, asked, service.settings))

    @app.post("/detokenize")
    async def detokenize_route(request: Request) -> JSONResponse:
        asked = await read_request(DetokenizeRequest, request.scope, request.receive, service.settings)
        return JSONResponse(await detokenize(service.engine, asked, service.settings))


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken; 503 once the server goes down or its engine has failed."""
        if service.engine.is_closed:
            return JSONResponse({"status": "engine closed"}, 503)
        if service.lifecycle.is_draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _as_json(request: Request, exception: Exception) -> Response:
    if isinstance(exception, ClientGone):
        return Response(status_code=499)  # to nobody
    return error_response(from_exception(exception))


async def _no_such_route(request: Request, exception: Exception) -> Response:
    assert isinstance(exception, HTTPException)
    known = {404: "there is no such route", 405: "the route does not have this method"}
    message = f"{request.method} {request.url.path[:200]}: {known.get(exception.status_code, exception.detail)}"
    response = error_response(ApiError(exception.status_code, message, code="not_found"))
    response.headers.update(exception.headers or {})
    return response
