"""The service's HTTP interface: routes, bodies, tokens, OpenAPI."""

import asyncio
import hmac
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import generate_latest
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployment.contract import Action, Answer, Observed, Problem, Refusal, Refused, State
from deployment.service import Service

OPEN_PATHS = ("/healthz", "/readyz")  # without a token
BODY_SECONDS = 10.0  # a request's body has to arrive within


class BearerToken:
    """ASGI middleware: only requests that carry the token get through."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self.app, self.expected = app, b"Bearer " + token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = _json(Refusal([Problem(["header", "authorization"], "not the token")]), 401)
                refusal.headers["WWW-Authenticate"] = "Bearer"
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)


def _json(content: Any, status: int = 200) -> Response:
    data = content if isinstance(content, bytes) else msgspec.json.encode(content)
    return Response(data, status, media_type="application/json")


async def _read_body(request: Request, limit: int) -> bytes:
    """
    Raises:
        Refused: it is not JSON, larger than the limit, or does not arrive.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused((), "send Content-Type: application/json", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise Refused((), f"more than {limit} bytes", 413)
    except TimeoutError:
        raise Refused((), f"not there within {BODY_SECONDS:g} s", 408) from None
    return bytes(body)


def create_app(service: Service, token: bytes | None = None) -> FastAPI:
    """The service over HTTP; with a token, only for those who carry it."""
    app = FastAPI(title="ResourceRL", version="1", docs_url=None, redoc_url=None)
    metrics, limit = service.metrics, service.args.max_body_bytes

    @app.post("/v1/decisions", summary="What to start now and where, and the priority of every queued job",
              **_contract(State, Answer))  # fmt: skip
    async def decisions(request: Request) -> Response:
        body = await _read_body(request, limit)
        with metrics.seconds.time():
            return _json(service.decide(body))

    @app.post("/v1/predict", summary="The action for a raw observation", **_contract(Observed, Action))
    async def predict(request: Request) -> Response:
        return _json(service.predict(await _read_body(request, limit)))

    @app.get("/v1/model", summary="What decides")
    async def model() -> dict[str, Any]:
        return service.describe()

    @app.get("/healthz", summary="Whether the service lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether it can decide")
    async def readyz() -> dict[str, str]:
        return {"status": "ok", "version": service.model.version}

    @app.get("/metrics", summary="Prometheus' metrics", response_class=Response,
             responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        metrics.invalid.labels(refused.status).inc()
        return _json(refused.refusal, refused.status)

    # FastAPI's way to a function without parameters costs a tenth of a decision: Starlette's own comes first.
    app.router.routes.insert(0, Route("/v1/decisions", decisions, methods=["POST"]))
    app.openapi = lambda: _openapi(app, token is not None)  # type: ignore[method-assign]  # as FastAPI extends it
    if token is not None:
        app.add_middleware(BearerToken, token=token)
    return app


def _contract(sent: type, answered: type) -> dict[str, Any]:
    """The OpenAPI of a route that reads its body itself: msgspec's schemas, by name."""

    def content(kind: type) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    refusals = {408: "too slow", 413: "too large", 415: "no JSON", 422: "refused, with the field"}
    return {
        "response_class": Response,
        "openapi_extra": {"requestBody": {"required": True, **content(sent)}},
        "responses": {
            200: {"description": answered.__name__, **content(answered)},
            **{status: {"description": text, **content(Refusal)} for status, text in refusals.items()},
        },
    }


def _openapi(app: FastAPI, token: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = msgspec.json.schema_components(
            [State, Answer, Observed, Action, Refusal], ref_template="#/components/schemas/{name}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        if token:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values() if path not in OPEN_PATHS else ():
                    operation["security"] = [{"token": []}]
                    operation["responses"]["401"] = {"description": "without the token"}
        app.openapi_schema = document
    return app.openapi_schema
