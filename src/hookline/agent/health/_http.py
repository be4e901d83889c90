"""HTTP and HTTPS checks: one connection, one GET, the status of its answer."""

from __future__ import annotations

import asyncio
from typing import Any

import h11

from hookline.agent.health import _tls
from hookline.agent.health.checks import Backend, CheckError
from hookline.model import HealthCheck

_CHUNK = 16384
_AGENT = "hookline-health"


async def ask(how: HealthCheck, backend: Backend, port: int) -> None:
    """Gets the path and looks at the status; the body is not waited for.

    Raises:
        CheckError: Another status, or what comes is no HTTP.
    """
    secure: dict[str, Any] = {}
    if how.type == "https":
        secure = {
            "ssl": _tls.context(how, "http/1.1"),
            "server_hostname": _tls.server_name(how, backend),
        }
    reader, writer = await asyncio.open_connection(str(backend.address), port, limit=_CHUNK, **secure)
    try:
        connection = h11.Connection(h11.CLIENT)
        default = 443 if secure else 80
        host = how.host or (backend.host if port == default else f"{backend.host}:{port}")
        headers = [("Host", host), ("User-Agent", _AGENT), ("Accept", "*/*"), ("Connection", "close")]
        request = h11.Request(method="GET", target=how.path, headers=headers)
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        status = await _status(connection, reader)
    except h11.RemoteProtocolError as error:
        raise CheckError("no-http", str(error)) from None
    finally:
        # At once, whatever is still to come: nothing waits for a peer that does not close.
        writer.transport.abort()
    if not how.accepts(status):
        raise CheckError("status", f"status {status}")


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(_CHUNK)
            if not data and not connection.trailing_data[0] and connection.their_state is h11.SEND_RESPONSE:
                raise CheckError("closed", "the server closed the connection before it answered")
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            return event.status_code
