"""What can be said of a service's traffic beyond its addresses: algorithm, health checks, affinity, slow start, draining.

`TrafficSettings` are the fields that a `VirtualService` has in its ``spec`` and that a `ServicePolicy` gives a Kubernetes
Service. Durations are seconds, whole or with a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from hookline.model._fields import SUBDOMAIN, Port
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own

AFFINITY_SECONDS = 10800
"""How long a client stays with its backend where nothing else is said; as in Kubernetes."""

DAY_SECONDS = 86400

Algorithm = Literal["maglev", "modulo"]
CheckType = Literal["tcp", "http", "https", "udp", "grpc", "command"]

# Which kinds of check each field is for; all others are for all.
ONLY_FOR: dict[str, tuple[CheckType, ...]] = {
    "port": ("tcp", "http", "https", "udp", "grpc"),
    "path": ("http", "https"),
    "host": ("http", "https"),
    "expected_statuses": ("http", "https"),
    "send": ("udp",),
    "expect": ("udp",),
    "service": ("grpc",),
    "command": ("command",),
    "tls": ("https", "grpc"),
}


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and low <= value <= high:
            return value  # type: ignore[no-any-return]
        remedy = ""
        if isinstance(value, str) and value[:12].removesuffix("s").replace(".", "", 1).isdigit():
            remedy = f"write {value.removesuffix('s')}"
        raise Refused(
            f"{value_text(value)} is not a number of seconds from {low:g} to {high:g}", remedy=remedy
        )

    return check


def _duration(low: float, high: float) -> Any:
    return PlainValidator(_seconds(low, high), json_schema_input_type=float)


IntervalSeconds = Annotated[float, _duration(0.01, 3600)]
OptionalSeconds = Annotated[float, _duration(0, DAY_SECONDS)]
"""A duration that may be 0, which switches what it is for off."""


def _text(what: str, begins: str = "") -> Any:
    """Text of a check's question: one line, nothing that could end it."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise Refused(f"{value_text(value)} is not text", remedy="put it in quotes")
        if (
            not value
            or not value.startswith(begins)
            or not value.isascii()
            or not value.isprintable()
            or " " in value
        ):
            start = f" that begins with {begins}" if begins else ""
            raise Refused(f"{value_text(value)} is not {what}: printable ASCII without spaces{start}")
        return value

    return PlainValidator(check, json_schema_input_type=str)


def _octets(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{value_text(value)} is not text", remedy="put it in quotes")
    try:
        length = len(octets_of(value))
    except ValueError:
        raise Refused(
            f"{value_text(value)} begins with 0x, and what follows is not pairs of hexadecimal digits"
        ) from None
    if length > 1024:
        raise Refused(f"{length} octets are more than a check's 1024")
    return value


def octets_of(text: str) -> bytes:
    """What a check sends or expects: the text in UTF-8, or after ``0x`` the octets that the digits give.

    Raises:
        ValueError: What follows ``0x`` is not pairs of hexadecimal digits.
    """
    return bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()


def _statuses(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
        return value
    if isinstance(value, str):
        low, dash, high = value.partition("-")
        if dash and all(len(one) == 3 and one.isascii() and one.isdigit() for one in (low, high)):
            if 100 <= int(low) <= int(high) <= 599:
                return value
        elif len(value) == 3 and value.isascii() and value.isdigit():
            raise Refused(f"{value_text(value)} in quotes is no status", remedy="remove the quotes")
    raise Refused(f'{value_text(value)} is neither a status from 100 to 599 nor a range such as "200-299"')


def _server_name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 253 or not SUBDOMAIN.fullmatch(value.lower()):
        raise Refused(f"{value_text(value)} is not a host's name")
    return value


def _file(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise Refused(f"{value_text(value)} is not the full path of a file, which begins with /")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{value_text(value)} is not text", remedy="put it in quotes")
    if "\0" in value:
        raise Refused(f"{value_text(value)} has a zero in it, which no program can be given")
    return value


class Tls(Own):
    """How a check over TLS knows whom it talks to.

    Attributes:
        ca_file: The certificates that are trusted, PEM; None: the system's.
        server_name: The name that the certificate must have; None: the check's `host`, or else the backend's address.
        insecure_skip_verify: Accept any certificate.
    """

    ca_file: Annotated[str, PlainValidator(_file, json_schema_input_type=str)] | None = None
    server_name: Annotated[str, PlainValidator(_server_name, json_schema_input_type=str)] | None = None
    insecure_skip_verify: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _one_way(self) -> Tls:
        if self.insecure_skip_verify and self.ca_file is not None:
            raise Refused(
                "caFile says whom to trust and insecureSkipVerify that it does not matter",
                remedy="remove one of them",
                at=("insecureSkipVerify",),
            )
        return self


class HealthCheck(Own):
    """How a backend is asked whether it is well.

    Attributes:
        type: ``tcp`` connects; ``http`` and ``https`` get `path`; ``udp`` sends `send` and waits for `expect`; ``grpc`` asks
            the health service (grpc.health.v1); ``command`` runs a program, which is told the backend by its environment
            and says with exit status 0 that it is well.
        port: Where to ask; None: the backend's own port.
        host: The Host header; None: the backend's address.
        expected_statuses: Statuses that are well, 200 or "200-299".
        send: The datagram; after ``0x`` hexadecimal.
        expect: What the answer must begin with; None: any answer, and without `send` none at all: only an ICMP error fails then.
        service: The service's name in a grpc check; empty: the server as a whole.
        interval_seconds: From the start of one check to the start of the next.
        timeout_seconds: A check without an answer for so long has failed; never longer than the interval.
        jitter_percent: Each interval is up to so much shorter, at random, so that checks do not come all at once.
        rise: Checks in a row that must succeed before a backend that is down gets connections.
        fall: Checks in a row that must fail before it gets none.
    """

    type: CheckType
    port: Port | None = None
    path: Annotated[str, _text("a path", "/")] = "/"
    host: Annotated[str, _text("a host")] | None = None
    expected_statuses: Annotated[
        tuple[Annotated[int | str, PlainValidator(_statuses, json_schema_input_type=int | str)], ...],
        Field(min_length=1),
    ] = ("200-399",)
    send: Annotated[str, PlainValidator(_octets, json_schema_input_type=str)] = ""
    expect: Annotated[str, PlainValidator(_octets, json_schema_input_type=str)] | None = None
    service: Annotated[str, _text("a service's name")] | Literal[""] = ""
    command: Annotated[
        tuple[Annotated[str, PlainValidator(_word, json_schema_input_type=str)], ...], Field(min_length=1)
    ] = Field(default=())
    interval_seconds: IntervalSeconds = 2.0
    timeout_seconds: IntervalSeconds = 1.0
    jitter_percent: Annotated[int, Field(strict=True, ge=0, le=50)] = 10
    rise: Annotated[int, Field(strict=True, ge=1, le=100)] = 2
    fall: Annotated[int, Field(strict=True, ge=1, le=100)] = 3
    tls: Tls | None = None

    @model_validator(mode="after")
    def _together(self) -> HealthCheck:
        if "timeout_seconds" not in self.model_fields_set:
            # Not a field that was set: the document stays as it was written.
            self.__dict__["timeout_seconds"] = min(1.0, self.interval_seconds)
        if refusals := list(self._refusals()):
            raise Refused.all(refusals)
        return self

    def _refusals(self) -> Iterator[Refused]:
        fields = type(self).model_fields
        for name in sorted(self.model_fields_set & ONLY_FOR.keys()):
            allowed = ONLY_FOR[name]
            if self.type not in allowed and getattr(self, name) is not None:
                alias = fields[name].alias or name
                yield Refused(
                    f"{alias} is for checks of type {' or '.join(allowed)}; this one is {self.type}",
                    remedy="remove it",
                    at=(alias,),
                )
        if self.type == "command" and not self.command:
            yield Refused(
                "a check of type command needs the program and its arguments",
                remedy="add command: [/path/of/program]",
            )
        if self.type == "udp" and self.expect is not None and not self.send:
            yield Refused("an answer is expected and nothing is sent", remedy="add send", at=("expect",))
        if self.timeout_seconds > self.interval_seconds:
            yield Refused(
                f"timeoutSeconds {self.timeout_seconds:g} is longer than intervalSeconds {self.interval_seconds:g}",
                at=("timeoutSeconds",),
            )

    def accepts(self, status: int) -> bool:
        """Whether an HTTP status is one of the expected."""
        for entry in self.expected_statuses:
            if isinstance(entry, int):
                if status == entry:
                    return True
            elif int(entry[:3]) <= status <= int(entry[4:]):
                return True
        return False


class SessionAffinity(Own):
    """Whether a client stays with its backend.

    Attributes:
        type: ``ClientIP``: new connections of an address go where its last one went.
        timeout_seconds: For so long after the last one.
    """

    type: Literal["ClientIP", "None"] = "ClientIP"
    timeout_seconds: Annotated[int, Field(strict=True, ge=1, le=DAY_SECONDS)] = AFFINITY_SECONDS

    @property
    def seconds(self) -> int:
        """The timeout; 0 for no affinity."""
        return self.timeout_seconds if self.type == "ClientIP" else 0


class TrafficSettings(Own):
    """How connections are shared out, and what becomes of backends that fail, come and go.

    Attributes:
        algorithm: ``maglev`` moves the fewest connections when backends change; ``modulo`` is the plain remainder.
        health_check: None: backends are well as long as they are named.
        slow_start_seconds: A backend that comes (back) gets its share little by little over so long.
        drain_seconds: A backend that is removed keeps its connections for so long, then they are ended; 0: at once.
        all_down: When every backend has failed its checks: ``reset`` refuses connections, ``failOpen`` tries all of them.
        session_affinity: None: for a Kubernetes Service what it says itself, else none.
    """

    algorithm: Algorithm = "maglev"
    health_check: HealthCheck | None = None
    slow_start_seconds: OptionalSeconds = 0
    drain_seconds: OptionalSeconds = 0
    all_down: Literal["failOpen", "reset"] = "reset"
    session_affinity: SessionAffinity | None = None
