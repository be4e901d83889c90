"""The agent's HTTP interface, on its Unix socket: ``/v1/…`` for the command line and others, ``/metrics`` for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hookline.agent import _wire
from hookline.agent._errors import AgentError, BadRequest, http_status, to_wire
from hookline.agent._logs import error_fields, fields, log
from hookline.agent._metrics import CONTENT_TYPE
from hookline.agent._watch import Differences
from hookline.control import Node
from hookline.errors import HooklineError
from hookline.model.names import NodeName

if TYPE_CHECKING:
    from hookline.agent._run import Agent

_LONGEST_PATH = 107
_SHORTEST_INTERVAL_S, _LONGEST_INTERVAL_S = 0.1, 86400.0
_LONGEST_NUMBER = 15
_LARGEST_BODY = 256 << 20
ASKED_WAITS_S = 5.0
"""For a fresh look at the counters, for who asks at the agent's own socket."""
Handler = Callable[[Request], Awaitable[Response]]


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the agent has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def application(agent: Agent) -> Starlette:
    """Everything that the socket answers."""
    api = _Api(agent)
    return Starlette(
        routes=[
            Route("/v1/health", api.answered(api.health)),
            Route("/v1/resources", api.answered(api.resources)),
            Route("/v1/services", api.answered(api.services)),
            Route("/v1/totals", api.answered(api.totals)),
            Route("/v1/policy-totals", api.answered(api.policy_totals)),
            Route("/v1/rule-counts", api.answered(api.rule_counts)),
            Route("/v1/attachments", api.answered(api.attachments)),
            Route("/v1/apply", api.answered(api.apply), methods=["POST"]),
            Route("/v1/plan", api.answered(api.plan), methods=["POST"]),
            Route("/v1/delete", api.answered(api.delete), methods=["POST"]),
            Route("/v1/rollback", api.answered(api.rollback), methods=["POST"]),
            Route("/v1/generations", api.answered(api.generations)),
            Route("/v1/check", api.answered(api.check), methods=["POST"]),
            Route("/v1/watch", api.answered(api.watch)),
            Route("/metrics", api.answered(api.metrics)),
        ]
    )


def metrics_application(agent: Agent) -> Starlette:
    """What a TCP address answers: the metrics, and nothing that changes anything."""
    api = _Api(agent)
    return Starlette(routes=[Route("/metrics", api.answered(api.scrape))])


class _Api:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def answered(self, handler: Handler) -> Handler:
        """The handler, its errors told in JSON."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except BadRequest as error:
                return JSONResponse(to_wire(error), 400)
            except HooklineError as error:
                return JSONResponse(to_wire(error), http_status(error))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except asyncio.CancelledError:
                if not self._agent.stopping.is_set():
                    raise
                # Who still waits when the agent ends is told so; uvicorn would log it as a fault.
                return JSONResponse(to_wire(AgentError("the agent is ending")), 503)
            except Exception as error:
                log.exception("request failed", extra=fields(path=request.url.path, **error_fields(error)))
                return JSONResponse(to_wire(error), 500)

        return answer

    async def health(self, _: Request) -> Response:
        return JSONResponse(self._agent.status())

    async def resources(self, _: Request) -> Response:
        def read(node: Node) -> bytes:
            found = ((one, node.source_of(one.reference)) for one in node.resources())
            return _wire.ITEMS.dump_json(_wire.items(found))

        return _json(await self._agent.worker.call(read))

    async def services(self, _: Request) -> Response:
        statuses = await self._agent.worker.call(lambda node: node.services())
        return _json(await asyncio.to_thread(_wire.dump_statuses, statuses))

    async def totals(self, _: Request) -> Response:
        return _json(_wire.TOTALS.dump_json(await self._agent.worker.call(lambda node: node.totals())))

    async def policy_totals(self, _: Request) -> Response:
        found = await self._agent.worker.call(lambda node: node.policy_totals())
        return _json(_wire.POLICY_TOTALS.dump_json(_wire.PolicyTotals.of(found)))

    async def rule_counts(self, _: Request) -> Response:
        found = await self._agent.worker.call(lambda node: node.rule_counts())
        return _json(_wire.RULE_COUNTS.dump_json(found))

    async def attachments(self, _: Request) -> Response:
        found = await self._agent.worker.call(lambda node: node.attachments())
        return _json(_wire.ATTACHMENTS.dump_json(found))

    async def apply(self, request: Request) -> Response:
        change = await _change(request)
        return _json(_wire.APPLIED.dump_json(await self._agent.apply(change)))

    async def plan(self, request: Request) -> Response:
        change = await _change(request)
        return _json(_wire.PLAN.dump_json(await self._agent.plan(change)))

    async def delete(self, request: Request) -> Response:
        change = await _change(request)
        return _json(_wire.APPLIED.dump_json(await self._agent.delete(change.delete)))

    async def rollback(self, request: Request) -> Response:
        wanted = request.query_params.get("to", "")
        if wanted and not (wanted.isascii() and wanted.isdigit() and len(wanted) <= _LONGEST_NUMBER):
            raise BadRequest(
                f"to={wanted[:40]!r} is no generation", remedy="GET /v1/generations names those that are kept"
            )
        to = int(wanted) if wanted else None
        if request.query_params.get("plan") == "true":
            return _json(_wire.PLAN.dump_json(await self._agent.plan_rollback(to)))
        return _json(_wire.APPLIED.dump_json(await self._agent.rollback(to)))

    async def generations(self, _: Request) -> Response:
        return _json(_wire.GENERATIONS.dump_json(await self._agent.generations()))

    async def check(self, _: Request) -> Response:
        repaired = await self._agent.check(full=True)
        return JSONResponse(
            {
                "repairs": [{"kind": one.kind, "what": one.what} for one in repaired.repairs],
                "problems": repaired.problems,
            }
        )

    async def watch(self, request: Request) -> Response:
        wanted = request.query_params.get("interval", "1")
        try:
            interval_s = float(wanted)
        except ValueError:
            interval_s = math.nan
        if not 0 <= interval_s <= _LONGEST_INTERVAL_S:
            raise BadRequest(
                f"interval={wanted[:40]!r} is no time to wait",
                why=f"it is a number of seconds, from 0 to {_LONGEST_INTERVAL_S:g}",
                remedy="say /v1/watch?interval=1",
            )
        interval_s = max(_SHORTEST_INTERVAL_S, interval_s)
        return StreamingResponse(self._updates(interval_s), media_type="application/x-ndjson")

    async def _updates(self, interval_s: float) -> AsyncIterator[bytes]:
        differences = Differences()
        while not self._agent.stopping.is_set():
            number = self._agent.changes.number
            statuses = await self._agent.worker.call(lambda node: node.services())
            pools, gone, whole = differences.of(statuses)
            if pools or gone or whole:
                yield _wire.update_json(pools, gone, whole=whole) + b"\n"
            else:
                yield b"\n"  # finds out whether anybody is still there
            await self._agent.changes.wait(number, interval_s)

    async def metrics(self, _: Request) -> Response:
        return Response(await self._agent.metrics_text(ASKED_WAITS_S), media_type=CONTENT_TYPE)

    async def scrape(self, _: Request) -> Response:
        return Response(await self._agent.metrics_text(), media_type=CONTENT_TYPE)


async def _change(request: Request) -> _wire.Change:
    """The change that a request's body asks for.

    Raises:
        BadRequest: It is none, or too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_BODY:
            raise BadRequest(
                "the request is too large",
                why=f"a body has {_LARGEST_BODY >> 20} MiB at most",
                remedy="send less at once",
            )
    try:
        # In a thread of its own: a large one takes a while, and others are answered meanwhile.
        return await asyncio.to_thread(_wire.CHANGE.validate_json, bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadRequest(
            "the request's body is not a change",
            why=f"{place + ': ' if place else ''}{first['msg']}{more}",
            remedy='send JSON as docs/agent.md has it: {"items": [{"object": {…}}], "delete": []}',
        ) from None


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def config(app: Starlette) -> uvicorn.Config:
    """How uvicorn serves: quietly, with its own log at warnings, and without waiting long for those who hang on."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        date_header=False,
        server_header=False,
        lifespan="off",
        http="h11",
        ws="none",
        timeout_graceful_shutdown=2,
    )


def unix_socket(name: NodeName) -> socket.socket:
    """The node's agent socket, for root alone, which refuses connections until it is served.

    One that a dead agent left is replaced: the agent's lock is held.

    Raises:
        AgentError: It cannot be made.
    """
    path = name.agent_socket
    if len(str(path)) > _LONGEST_PATH:
        raise AgentError(
            f"the agent's socket cannot have this path: {path}",
            why=f"it has {len(str(path))} characters, and a socket's path has {_LONGEST_PATH} at most",
            remedy="give the lab or its node a shorter name",
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise AgentError(f"{path} cannot be made", why=error.strerror or str(error)) from error
    finally:
        os.umask(before)
    return listener


def tcp_socket(address: str) -> socket.socket:
    """A listener at ``ADDRESS:PORT``, IPv6 addresses in brackets.

    Raises:
        AgentError: It is no address, or is taken.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or not 0 <= int(port) <= 65535 or not host:
        raise AgentError(
            f"{address!r} is not an address to listen at", remedy="say 127.0.0.1:9469 or [::1]:9469"
        )
    try:
        family, kind, number, _, where = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        listener = socket.socket(family, kind | socket.SOCK_CLOEXEC, number)
    except OSError as error:
        raise AgentError(
            f"{address!r} is not an address to listen at", why=error.strerror or str(error)
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise AgentError(f"cannot listen at {address}", why=error.strerror or str(error)) from error
    return listener


def serve(app: Starlette, listener: socket.socket) -> tuple[Server, asyncio.Task[Any]]:
    """Starts serving; set ``should_exit`` to end it."""
    server = Server(config(app))
    return server, asyncio.create_task(server.serve(sockets=[listener]))
