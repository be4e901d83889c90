"""Health checks of real servers in a lab's pods: nginx, a gRPC server, the lab's own; asked from the node's network namespace."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import pytest
import trustme

from hookline import api, lab, net
from hookline.agent.health import HealthSupervisor
from hookline.control.health import ACTIVE, DOWN, Health, HealthKey
from hookline.control.pools import Frontend, Pool, Target
from hookline.lab import Lab
from hookline.model import HealthCheck
from tests.lab.conftest import pods
from tests.requirements import missing_program, need

PATIENCE_S = 20.0
NGINX = """
user root; daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 8081; listen [::]:8081;
    listen 8443 ssl http2; listen [::]:8443 ssl http2;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
    location /healthz {{ if (-f {folder}/sick) {{ return 503; }} return 200 "well"; }}
    location /named {{ if ($host != orders.example) {{ return 404; }} return 204; }}
    location / {{ return 404; }}
  }}
}}
"""
GRPC = """
import sys, threading
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(futures.ThreadPoolExecutor(4))
state = health.HealthServicer()
health_pb2_grpc.add_HealthServicer_to_server(state, server)
key, certificate = (open(name, "rb").read() for name in sys.argv[1:3])
for host in ("0.0.0.0", "[::]"):
    server.add_insecure_port(host + ":9000")
    server.add_secure_port(host + ":9443", grpc.ssl_server_credentials([(key, certificate)]))
state.set("", health_pb2.HealthCheckResponse.SERVING)
state.set("orders", health_pb2.HealthCheckResponse.SERVING)
state.set("sick", health_pb2.HealthCheckResponse.NOT_SERVING)
server.start()
print("up", flush=True)
for line in sys.stdin:
    name, _, to = line.strip().partition(" ")
    state.set(name, health_pb2.HealthCheckResponse.ServingStatus.Value(to))
"""


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    need("lab", missing_program("nginx"))
    name = unique_name()
    try:
        yield api.lab_up(pods(3), name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, place: Lab) -> Path:
    """A CA, and a certificate for the pods' addresses and a name."""
    made = tmp_path_factory.mktemp("servers")
    made.chmod(0o755)
    authority = trustme.CA()
    addresses = [str(address) for member in place.pods for address in member.addresses]
    certificate = authority.issue_cert("orders.example", *addresses)
    authority.cert_pem.write_to_path(str(made / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(made / "server.key"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(made / "server.pem"), append=True)
    return made


class Started:
    """A server's process in a pod."""

    def __init__(self, words: list[str], netns: Path, **more: Any) -> None:
        with net.inside(netns):
            self.process = subprocess.Popen(words, start_new_session=True, **more)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def start_nginx(place: Lab, folder: Path) -> Started:
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    words = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    netns = place.member("p1").netns
    server = Started(words, netns)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with net.inside(netns), socket.create_connection(("::1", 8443), 1):
                return server
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def nginx(place: Lab, folder: Path) -> Iterator[Started]:
    server = start_nginx(place, folder)
    try:
        yield server
    finally:
        server.kill()
        (folder / "sick").unlink(missing_ok=True)


@pytest.fixture
def grpc(place: Lab, folder: Path) -> Iterator[Started]:
    server = Started(
        [sys.executable, "-c", GRPC, str(folder / "server.key"), str(folder / "server.pem")],
        place.member("p2").netns,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == "up\n"
        yield server
    finally:
        server.kill()


class Watched:
    """One pool of one pod, watched from the node's namespace."""

    def __init__(self, place: Lab, member: str, family: Literal[4, 6], port: int, check: HealthCheck) -> None:
        address = place.member(member).address(family)
        assert address is not None
        frontend = Frontend(ip_address("192.0.2.1" if family == 4 else "2001:db8::1"), 80, "TCP")
        target = Target(address, port, 100, member)
        self.pool = Pool(
            "Service/default/a",
            "80",
            family,
            "TCP",
            (frontend,),
            (target,),
            "nat",
            "maglev",
            1021,
            0,
            0,
            check,
        )
        self.key = HealthKey.of(self.pool, target)
        self.now: dict[HealthKey, Health] = {}
        self.supervisor = HealthSupervisor(self._said, namespace=place.first_node.netns)

    def _said(self, changes: Mapping[HealthKey, Health]) -> None:
        self.now.update(changes)

    def __enter__(self) -> Watched:
        self.supervisor.start()
        self.supervisor.update({self.pool.service: (self.pool,)})
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.stop()

    def becomes(self, health: Health, reason: str = "") -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.now.get(self.key) != health:
            assert time.monotonic() < deadline, (self.now, self.supervisor.standings())
            time.sleep(0.02)
        if reason:
            last = self.supervisor.standings()[self.key].last
            assert last is not None
            assert last.reason == reason, last


def how(kind: str, **fields: Any) -> HealthCheck:
    quick = {"intervalSeconds": 0.2, "timeoutSeconds": 0.2, "jitterPercent": 0, "rise": 1, "fall": 2}
    return HealthCheck.model_validate({"type": kind, **quick, **fields})


FAMILIES = pytest.mark.parametrize("family", [4, 6])


@FAMILIES
@pytest.mark.parametrize("kind", ["http", "https"])
def test_nginx(place: Lab, folder: Path, nginx: Started, kind: str, family: Literal[4, 6]) -> None:
    port, tls = (8443, {"tls": {"caFile": str(folder / "ca.pem")}}) if kind == "https" else (8081, {})
    generous = {"timeoutSeconds": 2.0, "intervalSeconds": 2.0, "fall": 1} if kind == "https" else {}
    with Watched(place, "p1", family, port, how(kind, path="/healthz", **tls, **generous)) as watched:
        watched.becomes(ACTIVE)
        (folder / "sick").touch()
        watched.becomes(DOWN, "status")
        (folder / "sick").unlink()
        watched.becomes(ACTIVE)
        nginx.kill()
        watched.becomes(DOWN, "refused")
    again = start_nginx(place, folder)
    try:
        named = how(kind, path="/named", host="orders.example", expectedStatuses=[204], **tls)
        with Watched(place, "p1", family, port, named) as watched:
            watched.becomes(ACTIVE)
        with Watched(place, "p1", family, port, how(kind, path="/elsewhere", **tls)) as watched:
            watched.becomes(DOWN)
    finally:
        again.kill()


@FAMILIES
def test_nginx_has_the_wrong_certificate(place: Lab, nginx: Started, family: Literal[4, 6]) -> None:
    with Watched(place, "p1", family, 8443, how("https", path="/healthz")) as watched:
        watched.becomes(DOWN, "certificate")
    skip = how(
        "https", path="/healthz", tls={"insecureSkipVerify": True}, timeoutSeconds=2, intervalSeconds=2
    )
    with Watched(place, "p1", family, 8443, skip) as watched:
        watched.becomes(ACTIVE)


@FAMILIES
@pytest.mark.parametrize("secure", [False, True])
def test_grpc(place: Lab, folder: Path, grpc: Started, secure: bool, family: Literal[4, 6]) -> None:
    port = 9443 if secure else 9000
    more: dict[str, Any] = {"timeoutSeconds": 2, "intervalSeconds": 2, "fall": 1}
    if secure:
        more["tls"] = {"caFile": str(folder / "ca.pem"), "serverName": "orders.example"}
    assert grpc.process.stdin is not None
    with Watched(place, "p2", family, port, how("grpc", service="orders", **more)) as watched:
        watched.becomes(ACTIVE)
        grpc.process.stdin.write("orders NOT_SERVING\n")
        grpc.process.stdin.flush()
        watched.becomes(DOWN, "not-serving")
    with Watched(place, "p2", family, port, how("grpc", **more)) as watched:
        watched.becomes(ACTIVE)
        grpc.kill()
        watched.becomes(DOWN, "refused")


@FAMILIES
def test_grpc_that_is_not_well(place: Lab, grpc: Started, nginx: Started, family: Literal[4, 6]) -> None:
    more = {"timeoutSeconds": 2, "intervalSeconds": 2}
    for service, reason in (("sick", "not-serving"), ("nowhere", "unknown-service")):
        with Watched(place, "p2", family, 9000, how("grpc", service=service, **more)) as watched:
            watched.becomes(DOWN, reason)
    with Watched(place, "p1", family, 8081, how("grpc", **more)) as watched:
        watched.becomes(DOWN)  # nginx answers in HTTP/1
    with Watched(place, "p0", family, 8080, how("grpc", timeoutSeconds=0.3, intervalSeconds=2)) as watched:
        watched.becomes(DOWN)  # a server of lines


@FAMILIES
def test_the_labs_servers(place: Lab, family: Literal[4, 6]) -> None:
    for kind, port, more in (
        ("tcp", 8080, {}),
        ("http", 8080, {}),
        ("udp", 5353, {"send": "who?", "expect": "default/p0"}),
        ("command", 8080, {"command": ["/bin/sh", "-c", _CONNECTS]}),
    ):
        generous = {"timeoutSeconds": 3, "intervalSeconds": 3}
        with Watched(place, "p0", family, port, how(kind, **more, **generous)) as watched:
            watched.becomes(ACTIVE)
        with Watched(place, "p0", family, 1, how(kind, **more, **generous)) as watched:
            watched.becomes(DOWN, "exit-status" if kind == "command" else "refused")


_CONNECTS = f"""exec {sys.executable} -c '
import os, socket
socket.create_connection((os.environ["HOOKLINE_BACKEND_ADDRESS"], int(os.environ["HOOKLINE_BACKEND_PORT"])), 2)'
"""


def test_a_namespace_that_is_not_there() -> None:
    supervisor = HealthSupervisor(lambda changes: None, namespace=Path("/run/netns/hl.nowhere"))
    with pytest.raises(net.NetworkError):
        supervisor.start()
    supervisor.stop()
