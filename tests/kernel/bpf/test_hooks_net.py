"""Each hook of interfaces, network namespaces and sockets: attached, counted with real packets, detached."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from hookline import bpf
from tests.kernel.bpf.conftest import Wire, elsewhere
from tests.kernel.bpf.hooks import Hooked, Open, each, fires, supported

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = [socket.AF_INET, socket.AF_INET6]


@contextlib.contextmanager
def listening(family: int = socket.AF_INET) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((LOOPBACK[socket.AddressFamily(family)], 0))
        server.listen(32)
        yield server


def connect(server: socket.socket) -> None:
    """One connection, accepted and closed at both ends."""
    with socket.create_connection(server.getsockname()[:2]) as client:
        taken, _ = server.accept()
        with taken:
            assert taken.getpeername()[:2] == client.getsockname()[:2]


@contextlib.contextmanager
def datagrams(family: int = socket.AF_INET) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two bound UDP sockets."""
    with (
        socket.socket(family, socket.SOCK_DGRAM) as one,
        socket.socket(family, socket.SOCK_DGRAM) as other,
    ):
        for end in (one, other):
            end.bind((LOOPBACK[socket.AddressFamily(family)], 0))
            end.settimeout(2)
        yield one, other


@pytest.fixture
def loopback_only() -> Iterator[None]:
    """The test runs in a network namespace of its own, with the loopback interface up, IPv6 too."""
    with elsewhere():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield


# Interfaces


def test_xdp(hooked: Open, wire: Wire) -> None:
    hook = hooked("xdp")
    for link in each(
        lambda: hook.program.attach("xdp:near"),
        lambda: hook.program.attach("xdp:near:generic"),
        lambda: hook.program.attach("xdp:near:native"),
    ):
        assert link.info.target == "near"
        fires(hook, link, wire.send)


@pytest.mark.parametrize("direction", ["ingress", "egress"])
@pytest.mark.parametrize("hook_name", ["tc", "tcx", "clsact"])
def test_traffic_control(hooked: Open, wire: Wire, hook_name: str, direction: str) -> None:
    if hook_name == "tcx":
        supported("tcx")
    interface = "near" if direction == "ingress" else "far"
    for name in ("tc", f"tcx_{direction}"):
        if name != "tc":
            if not bpf.features.attach("tcx"):
                continue
            hook = hooked(name)
            link = hook.program.attach(f"{hook_name}:{interface}")
        else:
            hook = hooked(name)
            link = hook.program.attach(f"{hook_name}:{interface}:{direction}")
        fires(hook, link, wire.send)


@pytest.fixture
def netkit(wire: Wire) -> Iterator[str]:
    """A pair of netkit devices, ``nk`` and a peer; the peer's name."""
    supported("netkit")
    with IPRoute() as netlink:
        netlink.link("add", ifname="nk", kind="netkit")
        names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in netlink.get_links()}
        index = socket.if_nametoindex("nk")
        peer = next(
            message["index"]
            for message in netlink.get_links()
            if message.get_attr("IFLA_LINK") == index and message["index"] != index
        )
        for number in (index, peer):
            netlink.link("set", index=number, state="up")
        netlink.addr("add", index=index, address="10.9.0.1", prefixlen=24)
        yield names[peer]


@pytest.mark.feature("hook", "netkit")
@pytest.mark.parametrize("end", ["primary", "peer"])
def test_netkit(hooked: Open, netkit: str, end: str) -> None:
    hook = hooked(f"netkit_{end}")
    sending = "nk" if end == "primary" else netkit

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(40), (sending, 0x0800, 0, 0, b""))

    for link in each(
        lambda: hook.program.attach_netkit("nk", end),  # type: ignore[arg-type]
        lambda: hook.program.attach("netkit:nk"),
        lambda: hook.program.attach(f"netkit:nk:{end}"),
    ):
        assert link.hook == "netkit"
        assert link.info.target == f"{sending} {end}"
        holds = bpf.query(f"netkit:nk:{end}")
        assert [(one.program_id, one.link_id) for one in holds.programs] == [(hook.program.id, link.id)]
        link.update(hook.program, expected=hook.program)
        fires(hook, link, send)
    with pytest.raises(bpf.BpfError, match="netkit"):
        hook.program.attach_netkit("near", end)  # type: ignore[arg-type]


@pytest.mark.feature("hook", "netfilter")
@pytest.mark.parametrize("family", FAMILIES)
def test_netfilter(hooked: Open, loopback_only: None, family: socket.AddressFamily) -> None:
    supported("netfilter")
    hook = hooked("netfilter")
    name = "ipv4" if family == socket.AF_INET else "ipv6"
    with datagrams(family) as (one, other):

        def send() -> None:
            one.sendto(b"x", other.getsockname())
            other.recv(10)

        for link in each(
            lambda: hook.program.attach_netfilter(name, "output", -7),  # type: ignore[arg-type]
            lambda: hook.program.attach_netfilter(name, "input", 5, defragment=True),  # type: ignore[arg-type]
            lambda: hook.program.attach(f"netfilter:{name}:prerouting:9"),
        ):
            assert (link.info.protocol_family, link.info.priority in (-7, 5, 9)) == (name, True)
            assert link.info.target.startswith(f"{name} {link.info.netfilter_hook} priority")
            with pytest.raises(bpf.BpfError, match=r"no update for links of type netfilter.*beside"):
                link.update(hook.program)
            fires(hook, link, send)
    with (
        hook.program.attach_netfilter("ipv4", "forward", 3),
        pytest.raises(bpf.BpfError, match="priority 3 is taken"),
    ):
        hook.program.attach_netfilter("ipv4", "forward", 3)


# Network namespaces


@pytest.mark.feature("hook", "sk_lookup")
@pytest.mark.parametrize("family", FAMILIES)
def test_sk_lookup(hooked: Open, loopback_only: None, family: socket.AddressFamily) -> None:
    hook = hooked("sk_lookup")
    namespace = os.stat("/proc/thread-self/ns/net").st_ino
    with listening(family) as server:
        for link in each(
            hook.program.attach_netns,
            hook.program.attach,
            lambda: hook.program.attach("netns:/proc/thread-self/ns/net"),
        ):
            assert (link.hook, link.info.netns_inode) == ("netns", namespace)
            holds = bpf.query("netns:sk_lookup")
            assert [one.program_id for one in holds.programs] == [hook.program.id]
            link.update(hook.program, expected=hook.program)
            fires(hook, link, lambda: connect(server))
    with pytest.raises(bpf.BpfError, match="there is no network namespace /run/netns/absent"):
        hook.program.attach_netns("absent")


@pytest.mark.feature("hook", "flow dissector")
def test_flow_dissector(hooked: Open, wire: Wire) -> None:
    """A packet socket looks for the transport header in each packet that it sends."""
    hook = hooked("flow_dissector")
    for link in each(hook.program.attach_netns, lambda: hook.program.attach("netns")):
        assert link.info.target.endswith(" flow_dissector")
        with pytest.raises(bpf.BpfError, match="there can be only one"):
            hook.program.attach_netns()
        fires(hook, link, wire.send)


# Sockets


@pytest.mark.feature("hook", "socket filter")
def test_socket_filter(hooked: Open, loopback_only: None) -> None:
    hook = hooked("socket_filter")
    with datagrams() as (one, other):

        def send() -> None:
            one.sendto(b"x", other.getsockname())
            assert other.recv(10) == b"x"

        for attachment in each(
            lambda: hook.program.attach_socket(other),
            lambda: hook.program.attach_socket(other.fileno()),
        ):
            assert attachment.hook == "socket"
            with pytest.raises(bpf.BpfError, match=r"does not tell which program"):
                attachment.update(hook.program, expected=hook.program)
            attachment.update(hook.program)
            with pytest.raises(bpf.BpfError, match=r"cannot be pinned.*leave\(\)"):
                attachment.pin("anywhere")
            fires(hook, attachment, send)
        kept = hook.program.attach_socket(other)
        kept.leave()
        with hook.more(3):
            for _ in range(3):
                send()


def test_a_filter_of_a_raw_socket_sees_every_frame(hooked: Open, wire: Wire) -> None:
    hook = hooked("socket_filter")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as tap:
        tap.bind(("near", 0x88B5))
        tap.settimeout(2)

        def send() -> None:
            wire.send()
            assert tap.recv(100)[12:14] == b"\x88\xb5"

        fires(hook, hook.program.attach_socket(tap), send)


def test_a_filter_of_a_closed_socket_is_nobodys(hooked: Open, loopback_only: None) -> None:
    hook = hooked("socket_filter")
    with datagrams() as (_, other):
        attachment = hook.program.attach_socket(other.fileno())
    # The number is taken by another socket, which must stay as it is.
    with datagrams() as (one, other), hook.program.attach_socket(other):
        attachment.close()
        with hook.more(2):
            for _ in range(2):
                one.sendto(b"x", other.getsockname())
                other.recv(10)
    with pytest.raises(bpf.BpfError, match="it is closed"):
        hook.program.attach_socket(other)
    with open("/dev/null") as file, pytest.raises(bpf.BpfError, match="it is no socket"):
        hook.program.attach_socket(file.fileno())


@pytest.mark.feature("hook", "socket filter of another process's socket")
def test_another_process_s_socket(hooked: Open) -> None:
    hook = hooked("socket_filter")
    script = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n"
        "print(s.fileno(), s.getsockname()[1], flush=True)\n"
        "while (data := s.recv(100)) != b'end': print(data.decode(), flush=True)\n"
        "s.close(); print('closed', flush=True); input()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        fd, port = map(int, child.stdout.readline().split())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(("127.0.0.1", port))

            def send() -> None:
                assert child.stdout is not None
                sender.send(b"hello")
                assert child.stdout.readline() == "hello\n"

            fires(hook, hook.program.attach_socket_of(child.pid, fd), send)
            with pytest.raises(bpf.BpfError, match=rf"cannot take socket 99 of process {child.pid}"):
                hook.program.attach_socket_of(child.pid, 99)
            with pytest.raises(bpf.BpfError, match="there is no process"):
                hook.program.attach_socket_of(0x3FFFFF, 0)
            last = hook.program.attach_socket_of(child.pid, fd)
            sender.send(b"end")
            assert child.stdout.readline() == "closed\n"
            # Nothing of ours kept it open: its port is free again.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(("127.0.0.1", port))
            last.close()
    finally:
        child.communicate("\n")


@pytest.mark.feature("hook", "reuseport")
@pytest.mark.parametrize("family", FAMILIES)
def test_reuseport(hooked: Open, loopback_only: None, family: socket.AddressFamily) -> None:
    hook = hooked("sk_reuseport")
    with contextlib.ExitStack() as opened:
        group = [opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2)]
        port = 0
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((LOOPBACK[family], port))
            port = one.getsockname()[1]
        sender = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))

        def send() -> None:
            sender.sendto(b"x", (LOOPBACK[family], port))
            ready, _, _ = select.select(group, [], [], 2)
            assert ready[0].recv(10) == b"x"

        fires(hook, hook.program.attach_socket(group[0]), send)
        with socket.socket() as alone, pytest.raises(bpf.BpfError, match="want a bound socket"):
            hook.program.attach_socket(alone)


@contextlib.contextmanager
def in_a_map(hook: Hooked, family: int = socket.AF_INET) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose server's end is in the socket map."""
    with listening(family) as server, socket.create_connection(server.getsockname()[:2]) as client:
        taken, _ = server.accept()
        with taken:
            hook.object.maps["sockets"][0] = taken.fileno()
            yield taken, client


def exchanged(source: socket.socket, target: socket.socket) -> Callable[[], None]:
    def send() -> None:
        source.sendall(b"hello")
        assert target.recv(100) == b"hello"

    return send


@pytest.mark.feature("hook", "sk_msg")
@pytest.mark.parametrize("family", FAMILIES)
def test_sk_msg(hooked: Open, loopback_only: None, family: socket.AddressFamily) -> None:
    hook = hooked("sk_msg")
    link = hook.program.attach_sockmap(hook.object.maps["sockets"])
    assert link.hook == "sockmap"
    with in_a_map(hook, family) as (server, client):
        with hook.more(5):
            for _ in range(5):
                exchanged(server, client)()
        link.close()
    with in_a_map(hook, family) as (server, client), hook.more(0):
        exchanged(server, client)()


def test_a_socket_keeps_the_programs_that_its_map_had(hooked: Open, loopback_only: None) -> None:
    """What is put into a map takes its programs along; an update is for what comes later."""
    hook, other = hooked("sk_msg"), hooked("sk_msg")
    with hook.program.attach_sockmap(hook.object.maps["sockets"]) as link:
        with in_a_map(hook) as (server, client):
            link.update(other.program, expected=hook.program)
            with pytest.raises(bpf.LinkChanged):
                link.update(other.program, expected=hook.program)
            with hook.more(1), other.more(0):
                exchanged(server, client)()
        with in_a_map(hook) as (server, client), hook.more(0), other.more(1):
            exchanged(server, client)()


@pytest.mark.feature("hook", "sk_skb verdict")
@pytest.mark.parametrize("kind", ["verdict", None])
def test_sk_skb_verdict(hooked: Open, loopback_only: None, kind: Any) -> None:
    hook = hooked("sk_skb_verdict")
    link = hook.program.attach_sockmap(hook.object.maps["sockets"], kind)
    with in_a_map(hook) as (server, client):
        send = exchanged(client, server)
        with hook.more(5):
            for _ in range(5):
                send()
    link.close()
    with in_a_map(hook) as (server, client), hook.more(0):
        exchanged(client, server)()


@pytest.mark.feature("hook", "sk_skb parser")
def test_sk_skb_parser_and_verdict(hooked: Open, loopback_only: None) -> None:
    hook = hooked("sk_skb_stream_parser", "sk_skb_stream_verdict")
    sockets = hook.object.maps["sockets"]
    with (
        hook["sk_skb_stream_parser"].attach_sockmap(sockets),
        hook["sk_skb_stream_verdict"].attach_sockmap(sockets),
        in_a_map(hook) as (server, client),
        hook.more(5, "sk_skb_stream_parser"),
        hook.more(5, "sk_skb_stream_verdict"),
    ):
        send = exchanged(client, server)
        for _ in range(5):
            send()
    with in_a_map(hook) as (server, client), hook.more(0, "sk_skb_stream_verdict"):
        exchanged(client, server)()


@pytest.mark.feature("hook", "a socket map's program by a link")
def test_a_socket_map_has_a_link_from_6_10_on(hooked: Open, pins: Path) -> None:
    supported("sockmap links")
    hook = hooked("sk_msg")
    sockets = hook.object.maps["sockets"]
    with hook.program.attach_sockmap(sockets) as link:
        assert isinstance(link, bpf.Link)
        assert (link.info.map_id, link.info.attach_type) == (sockets.id, bpf.AttachType.SK_MSG_VERDICT)
        with pytest.raises(bpf.BpfError, match="another link holds it"):
            hook.program.attach_sockmap(sockets)
        link.pin(pins / "link")
    with bpf.Link.from_pin(pins / "link") as adopted:
        assert adopted.info.program_id == hook.program.id
        adopted.detach()


def test_before_6_10_the_map_holds_the_program(
    hooked: Open, loopback_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older kernel answers to the link is played; the attachment itself is real."""
    from hookline.bpf._links import _attach_socket

    monkeypatch.setattr(_attach_socket, "create", lambda *_: -22)
    hook, other = hooked("sk_msg"), hooked("sk_msg")
    sockets = hook.object.maps["sockets"]
    attachment = hook.program.attach_sockmap(sockets)
    assert isinstance(attachment, bpf.MapAttachment)
    with in_a_map(hook) as (server, client), hook.more(3):
        for _ in range(3):
            exchanged(server, client)()
    with pytest.raises(bpf.LinkChanged, match="nothing was changed"):
        attachment.update(other.program, expected=other.program)
    attachment.update(other.program, expected=hook.program)
    with in_a_map(hook) as (server, client), hook.more(0), other.more(1):
        exchanged(server, client)()
    attachment.close()
    with in_a_map(hook) as (server, client), hook.more(0), other.more(0):
        exchanged(server, client)()
    with pytest.warns(ResourceWarning, match="neither closed nor left"):
        hook.program.attach_sockmap(sockets)


def test_only_socket_maps(hooked: Open) -> None:
    hook = hooked("sk_msg")
    with pytest.raises(bpf.BpfError, match="it is a hash, and a sockmap or sockhash is wanted"):
        hook.program.attach_sockmap(hook.object.maps["numbers"])
    skb = hooked("sk_skb_verdict")
    with pytest.raises(bpf.BpfError, match="there is no kind of sk_skb program 'verdikt'"):
        skb.program.attach_sockmap(skb.object.maps["sockets"], "verdikt")  # type: ignore[arg-type]


def test_a_forgotten_filter_warns(hooked: Open) -> None:
    hook = hooked("socket_filter")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        pytest.warns(ResourceWarning, match="neither closed nor left"),
    ):
        hook.program.attach_socket(one)
