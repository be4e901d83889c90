"""gRPC checks: the standard health service, ``grpc.health.v1.Health/Check``.

The two messages have one field each, and their encoding (protobuf) is a few lines; with it grpclib needs no protobuf runtime.
Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import struct
from typing import Any

from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from hookline.agent.health import _tls
from hookline.agent.health.checks import Backend, CheckError
from hookline.model import HealthCheck

_METHOD = "/grpc.health.v1.Health/Check"
_STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_SERVING = 1


class _Codec(CodecBase):
    """``HealthCheckRequest`` (its service) there, ``HealthCheckResponse`` (its status) back."""

    __content_subtype__ = "proto"

    def encode(self, message: str, message_type: Any) -> bytes:
        service = message.encode()
        return b"\x0a" + _varint(len(service)) + service if service else b""

    def decode(self, data: bytes, message_type: Any) -> int:
        status = 0  # what is left out has its default
        position = 0
        while position < len(data):
            tag, position = _read_varint(data, position)
            match tag & 7:
                case 0:
                    value, position = _read_varint(data, position)
                    if tag >> 3 == 1:
                        status = value
                case 1:
                    position += 8
                case 2:
                    length, position = _read_varint(data, position)
                    position += length
                case 5:
                    position += 4
                case other:
                    raise CheckError("no-grpc", f"a field of wire type {other}")
        return status


async def ask(how: HealthCheck, backend: Backend, port: int) -> None:
    """Asks the server for the state of one service, or of itself.

    Raises:
        CheckError: It is not serving, does not know the service, or has no health service.
    """
    secure = _tls.context(how, "h2") if how.tls else None
    name = _tls.server_name(how, backend) if how.tls else None
    channel = Channel(
        str(backend.address),
        port,
        codec=_Codec(),
        ssl=secure,
        config=Configuration(ssl_target_name_override=name),
    )
    method: UnaryUnaryMethod[str, int] = UnaryUnaryMethod(channel, _METHOD, str, int)
    try:
        status = await method(how.service)
    except GRPCError as error:
        reason = {Status.NOT_FOUND: "unknown-service", Status.UNIMPLEMENTED: "no-health-service"}
        raise CheckError(
            reason.get(error.status, "status"), f"{error.status.name}: {error.message or ''}".rstrip(": ")
        ) from None
    except (ProtocolError, StreamTerminatedError, struct.error, IndexError) as error:
        raise CheckError("no-grpc", str(error) or type(error).__name__) from None
    finally:
        # Channel.close() says goodbye first, and over TLS waits half a minute for a peer that says nothing.
        connection = getattr(channel._protocol, "connection", None)
        transport = getattr(connection, "_transport", None)
        channel.close()
        if transport is not None:
            transport.abort()
    if status != _SERVING:
        raise CheckError("not-serving", _STATUSES.get(status, str(status)))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        octet = data[position]
        number |= (octet & 0x7F) << shift
        position += 1
        if octet < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise CheckError("no-grpc", "a number without an end")
