"""Every kind of check against a server that does right and servers that do wrong, on both families' loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from hookline.agent.health import Backend, Result, check
from hookline.model import HealthCheck

LOOPBACK = ("127.0.0.1", "::1")
SILENT: bytes | None = None


def how(kind: str, **fields: Any) -> HealthCheck:
    return HealthCheck.model_validate({"type": kind, "intervalSeconds": 5, "timeoutSeconds": 2, **fields})


def ask(settings: HealthCheck, address: str, port: int) -> Result:
    return asyncio.run(check(settings, Backend(ip_address(address), port, "Service/default/a", "http")))


@contextmanager
def tcp_server(
    address: str, answer: Callable[[socket.socket], None], *, wrap: ssl.SSLContext | None = None
) -> Iterator[int]:
    """A server that does one thing with each connection."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    ended = threading.Event()
    with socket.create_server((address, 0), family=family, backlog=16) as listener:
        listener.settimeout(0.05)

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    continue
                connection.settimeout(5)
                with contextlib.suppress(OSError), connection:
                    if wrap is None:
                        answer(connection)
                    else:
                        with wrap.wrap_socket(connection, server_side=True) as secure:
                            answer(secure)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            thread.join()


@contextmanager
def udp_server(address: str, answers: dict[bytes, bytes | None]) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, 0))
        server.settimeout(0.05)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    datagram, peer = server.recvfrom(4096)
                    reply = answers.get(datagram)
                    if reply is not None:
                        server.sendto(reply, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def closed_port(address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as handle:
        handle.bind((address, 0))
        return int(handle.getsockname()[1])


def says(answer: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)

    return serve


def hangs(connection: socket.socket) -> None:
    with contextlib.suppress(TimeoutError):
        while connection.recv(4096):
            pass


# -- TCP


@pytest.mark.parametrize("address", LOOPBACK)
def test_tcp(address: str) -> None:
    with tcp_server(address, hangs) as port:
        result = ask(how("tcp"), address, port)
        assert (result.outcome, result.reason) == ("passed", "passed")
        assert 0 < result.seconds < 2
        assert ask(how("tcp", port=port), address, 1).outcome == "passed", "another port than the backend's"
    assert ask(how("tcp"), address, closed_port(address)).reason == "refused"


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_full_backlog_times_out(address: str) -> None:
    """The kernel drops what the backlog has no room for, as a dead machine's network does."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=0) as listener:
        filling = [socket.socket(family, socket.SOCK_STREAM) for _ in range(4)]
        for handle in filling:
            handle.setblocking(False)
            handle.connect_ex(listener.getsockname())
        begun = time.monotonic()
        result = ask(how("tcp", timeoutSeconds=0.3), address, listener.getsockname()[1])
        assert (result.outcome, result.reason) == ("failed", "timeout")
        assert 0.3 <= time.monotonic() - begun < 2
        for handle in filling:
            handle.close()


def test_no_way_there() -> None:
    assert ask(how("tcp", timeoutSeconds=0.2), "2001:db8:dead::1", 80).reason in ("unreachable", "timeout")


# -- HTTP


@pytest.mark.parametrize("address", LOOPBACK)
@pytest.mark.parametrize(
    ("answer", "outcome", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "passed", "passed"),
        (b"HTTP/1.0 204 No Content\r\n\r\n", "passed", "passed"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "passed", "passed"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "passed", "passed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\nonly the beginning", "passed", "passed"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "failed", "status"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "failed", "status"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "failed", "no-http"),
        (b"\0\xff" * 100 + b"\r\n\r\n", "failed", "no-http"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "failed", "no-http"),
        (b"HTTP/1.1 200", "failed", "no-http"),
        (b"", "failed", "closed"),
    ],
)
def test_http_answers(address: str, answer: bytes, outcome: str, reason: str) -> None:
    with tcp_server(address, says(answer)) as port:
        result = ask(how("http"), address, port)
        assert (result.outcome, result.reason) == (outcome, reason), result.detail


@pytest.mark.parametrize("address", LOOPBACK)
def test_http_that_never_answers_and_what_is_asked(address: str) -> None:
    asked = []

    def note(connection: socket.socket) -> None:
        asked.append(connection.recv(4096).decode())
        connection.sendall(b"HTTP/1.1 418 Teapot\r\n\r\n")

    with tcp_server(address, hangs) as port:
        assert ask(how("http", timeoutSeconds=0.2), address, port).reason == "timeout"
    with tcp_server(address, note) as port:
        settings = how(
            "http", path="/health?full=1", host="orders.example", expectedStatuses=[418, "500-599"]
        )
        assert ask(settings, address, port).outcome == "passed"
        lines = asked.pop().splitlines()
        assert lines[0] == "GET /health?full=1 HTTP/1.1"
        assert "host: orders.example" in [line.lower() for line in lines]
        assert ask(how("http"), address, port).reason == "status"
        host = f"[{address}]" if ":" in address else address
        assert f"host: {host}:{port}" in asked.pop().lower().splitlines()
    assert ask(how("http"), address, closed_port(address)).reason == "refused"


# -- HTTPS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    made = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    made.cert_pem.write_to_path(str(path))
    return made, path


def server_context(made: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.issue_cert(*names).configure_cert(context)
    return context


OK = says(b"HTTP/1.1 200 OK\r\n\r\n")


@pytest.mark.parametrize("address", LOOPBACK)
def test_https(address: str, authority: tuple[trustme.CA, Path]) -> None:
    made, path = authority
    trusted = {"caFile": str(path)}
    asked_for: list[str | None] = []
    context = server_context(made, "orders.example", address)
    context.sni_callback = lambda _, name, __: asked_for.append(name)
    with tcp_server(address, OK, wrap=context) as port:
        assert ask(how("https", tls=trusted), address, port).outcome == "passed", "by the address"
        assert ask(how("https", tls=trusted, host="orders.example:8443"), address, port).outcome == "passed"
        named = {**trusted, "serverName": "orders.example"}
        assert ask(how("https", tls=named, host="other.example"), address, port).outcome == "passed"
        assert asked_for == [None, "orders.example", "orders.example"]
        wrong = ask(how("https", tls={**trusted, "serverName": "wrong.example"}), address, port)
        assert (wrong.outcome, wrong.reason) == ("failed", "certificate")
        assert ask(how("https"), address, port).reason == "certificate", "the system does not know this CA"
        assert ask(how("https", tls={"insecureSkipVerify": True}), address, port).outcome == "passed"
        assert ask(how("http"), address, port).outcome == "failed"
    with tcp_server(address, OK) as port:
        plain = ask(how("https", tls={"insecureSkipVerify": True}), address, port)
        assert (plain.outcome, plain.reason) == ("failed", "tls")


def test_a_ca_file_that_changes_or_is_not_there(tmp_path: Path, authority: tuple[trustme.CA, Path]) -> None:
    made, path = authority
    own = tmp_path / "ca.pem"
    settings = how("https", tls={"caFile": str(own)})
    with tcp_server("127.0.0.1", OK, wrap=server_context(made, "127.0.0.1")) as port:
        missing = ask(settings, "127.0.0.1", port)
        assert (missing.outcome, missing.reason) == ("failed", "ca-file")
        assert str(own) in missing.detail
        own.write_text("no certificate")
        assert ask(settings, "127.0.0.1", port).reason == "ca-file"
        trustme.CA().cert_pem.write_to_path(str(own))
        assert ask(settings, "127.0.0.1", port).reason == "certificate"
        own.write_bytes(path.read_bytes())
        assert ask(settings, "127.0.0.1", port).outcome == "passed"


# -- UDP


@pytest.mark.parametrize("address", LOOPBACK)
def test_udp(address: str) -> None:
    answers = {b"ping": b"pong 1", b"\x01\x02": b"\xff\xfe", b"silent": SILENT, b"": SILENT}
    with udp_server(address, answers) as port:
        assert ask(how("udp", send="ping", expect="pong"), address, port).outcome == "passed"
        assert ask(how("udp", send="ping"), address, port).outcome == "passed", "any answer"
        assert ask(how("udp", send="0x0102", expect="0xff"), address, port).outcome == "passed"
        mismatch = ask(how("udp", send="ping", expect="pang"), address, port)
        assert (mismatch.outcome, mismatch.reason) == ("failed", "mismatch")
        quick = {"timeoutSeconds": 0.2}
        assert ask(how("udp", send="silent", **quick), address, port).reason == "timeout"
        assert ask(how("udp", **quick), address, port).outcome == "passed", "nothing asked, nothing refused"
    refused = ask(how("udp", send="ping"), address, closed_port(address, socket.SOCK_DGRAM))
    assert (refused.outcome, refused.reason) == ("failed", "refused")
    assert refused.seconds < 1, "ICMP says it at once"
    assert ask(how("udp"), address, closed_port(address, socket.SOCK_DGRAM)).reason == "refused"


# -- commands


def command(*words: str, **fields: Any) -> Result:
    return ask(how("command", command=list(words), **fields), "127.0.0.1", 8080)


def test_command() -> None:
    assert command("/bin/true").outcome == "passed"
    failed = command("/bin/false")
    assert (failed.outcome, failed.reason, failed.detail) == ("failed", "exit-status", "exit status 1")
    assert command("/bin/sh", "-c", "kill -9 $$").reason == "signal"
    missing = command("/nowhere/check")
    assert (missing.outcome, missing.reason) == ("failed", "command")
    assert "/nowhere/check" in missing.detail


def test_a_command_has_no_shell_and_knows_the_backend(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    assert command("/bin/echo", f"$(touch {noted}); touch {noted}").outcome == "passed"
    assert not noted.exists()
    # /bin/sh is the program here, by the user's own wish
    assert command("/bin/sh", "-c", f"env > {noted}; pwd >> {noted}").outcome == "passed"
    lines = noted.read_text().splitlines()
    assert {
        "HOOKLINE_SERVICE=Service/default/a",
        "HOOKLINE_PORT=http",
        "HOOKLINE_PROTOCOL=tcp",
        "HOOKLINE_BACKEND_ADDRESS=127.0.0.1",
        "HOOKLINE_BACKEND_PORT=8080",
        "HOOKLINE_TIMEOUT_SECONDS=2",
        "/",
    } <= set(lines)
    assert not any(line.startswith(("HOOKLINE_STATE", "HOOKLINE_TEST_RUN")) for line in lines)


def gone(number: int) -> bool:
    """Whether a process has ended, be it a zombie of somebody else's."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("ends", [True, False])
def test_a_commands_whole_group_is_killed(tmp_path: Path, ends: bool) -> None:
    """Also where the command itself has ended and left children behind."""
    noted = tmp_path / "numbers"
    # The first child ignores what can be ignored.
    script = f"(trap '' TERM HUP INT; echo $$ > {noted}; exec sleep 300) & sleep 300 & echo $! >> {noted}.2; "
    script += "sleep 0.2; exit 0" if ends else "wait"
    result = command("/bin/sh", "-c", script, timeoutSeconds=2 if ends else 0.5)
    assert result.reason == ("passed" if ends else "timeout")
    numbers = [int(path.read_text()) for path in (noted, Path(f"{noted}.2"))]
    deadline = time.monotonic() + 5
    while not all(map(gone, numbers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(gone, numbers))


def test_commands_leave_no_zombies_and_no_descriptors() -> None:
    async def many() -> None:
        settings = how("command", command=["/bin/sleep", "300"], timeoutSeconds=0.05)
        backend = Backend(ip_address("127.0.0.1"), 80)
        await asyncio.gather(*(check(settings, backend) for _ in range(10)))
        await asyncio.sleep(0.2)

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(many())
    assert len(os.listdir("/proc/self/fd")) == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [number for number in children if "sleep" in _name(number)]


def _name(number: str) -> str:
    try:
        return Path(f"/proc/{number}/comm").read_text()
    except OSError:
        return ""


# -- what says nothing of a backend


def test_what_this_machine_lacks_decides_nothing() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def without_descriptors() -> Result:
        lowest = os.open("/", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            return await check(how("tcp"), Backend(ip_address("127.0.0.1"), 1))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    result = asyncio.run(without_descriptors())
    assert (result.outcome, result.reason) == ("undecided", "error")


def test_a_process_that_was_held_up_blames_nobody() -> None:
    async def held_up() -> Result:
        task = asyncio.create_task(check(how("tcp", timeoutSeconds=0.1), backend))
        await asyncio.sleep(0)
        time.sleep(0.6)
        return await task

    family = socket.AF_INET
    with socket.create_server(("127.0.0.1", 0), family=family, backlog=0) as listener:
        filling = [socket.socket(family, socket.SOCK_STREAM) for _ in range(4)]
        for handle in filling:
            handle.setblocking(False)
            handle.connect_ex(listener.getsockname())
        backend = Backend(ip_address("127.0.0.1"), listener.getsockname()[1])
        result = asyncio.run(held_up())
        assert (result.outcome, result.reason) == ("undecided", "stalled")
        for handle in filling:
            handle.close()


def test_a_check_that_has_a_bug_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookline.agent.health import checks

    async def broken(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(checks, "_tcp", broken)
    result = ask(how("tcp"), "127.0.0.1", 1)
    assert (result.outcome, result.reason) == ("undecided", "error")
    assert "KeyError" in result.detail


def test_checks_are_imported_at_their_first_use() -> None:
    import subprocess

    code = "import sys, hookline.agent.health; print([name for name in ('h11', 'grpclib', 'h2') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
