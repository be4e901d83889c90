"""Each hook of a cgroup: attached to one that the test made and is in, counted, detached."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import bpf
from tests.kernel.bpf.hooks import Open, each, fires, supported
from tests.kernel.bpf.test_hooks_net import LOOPBACK, connect, datagrams, listening
from tests.requirements import missing_program, need

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def cgroup(unique_name: Callable[[], str]) -> Iterator[Path]:
    """A cgroup that this process is in while the test runs."""
    root = bpf.cgroup_folder()
    home = next(
        line.partition("::")[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    folder = root / unique_name()
    folder.mkdir()
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield folder
    finally:
        (root / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        folder.rmdir()


def bind(family: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.bind((LOOPBACK[socket.AddressFamily(family)], 0))


def connected(family: int) -> None:
    with listening(family) as server:
        connect(server)


def ends(family: int) -> tuple[socket.socket, socket.socket]:
    """A connection's two ends."""
    with listening(family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        taken, _ = server.accept()
        return client, taken


@pytest.mark.feature("hook", "cgroup: bind")
def test_bind(hooked: Open, cgroup: Path) -> None:
    for name, family in (("bind4", V4), ("bind6", V6), ("post_bind4", V4), ("post_bind6", V6)):
        hook = hooked(name)
        fires(hook, hook.program.attach(f"cgroup:{cgroup}"), lambda f=family: bind(f))  # type: ignore[misc]


@pytest.mark.feature("hook", "cgroup: connect")
@pytest.mark.parametrize(("name", "family"), [("connect4", V4), ("connect6", V6)])
def test_connect(hooked: Open, cgroup: Path, name: str, family: int) -> None:
    hook = hooked(name)
    number = os.stat(cgroup).st_ino
    for link in each(
        lambda: hook.program.attach(f"cgroup:{cgroup}"),
        lambda: hook.program.attach(f"cgroup:{cgroup}:{name}"),
        lambda: hook.program.attach_cgroup(cgroup),
        lambda: hook.program.attach_cgroup(cgroup.name, name),
        lambda: hook.program.attach_cgroup(cgroup, hook.program.expected_attach_type),
    ):
        assert (link.hook, link.info.cgroup_id) == ("cgroup", number)
        assert link.info.attach_type == hook.program.expected_attach_type
        held = bpf.query(f"cgroup:{cgroup}:{name}").programs
        assert [one.program_id for one in held] == [hook.program.id]
        everything = bpf.query(f"cgroup:{cgroup}:{name}", effective=True).programs
        assert hook.program.id in {one.program_id for one in everything}
        with listening(family) as server:
            fires(hook, link, lambda: connect(server))
    assert bpf.query(f"cgroup:{cgroup}:{name}").programs == ()


@pytest.mark.feature("hook", "cgroup: connect of Unix sockets")
def test_unix_connect(hooked: Open, cgroup: Path, tmp_path: Path) -> None:
    supported("cgroup/connect_unix")
    hook = hooked("connect_unix")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "s"))
        server.listen(16)

        def reach() -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(tmp_path / "s"))

        fires(hook, hook.program.attach(f"cgroup:{cgroup}"), reach)


@pytest.mark.feature("hook", "cgroup: sendmsg and recvmsg")
@pytest.mark.parametrize(("version", "family"), [(4, V4), (6, V6)])
def test_datagrams(hooked: Open, cgroup: Path, version: int, family: int) -> None:
    for name in (f"sendmsg{version}", f"recvmsg{version}"):
        hook = hooked(name)
        with datagrams(family) as (one, other):

            def send() -> None:
                one.sendto(b"x", other.getsockname())
                other.recvfrom(10)

            fires(hook, hook.program.attach_cgroup(cgroup), send)


@pytest.mark.feature("hook", "cgroup: packets (cgroup_skb)")
@pytest.mark.parametrize("family", [V4, V6])
def test_packets_of_a_cgroup(hooked: Open, cgroup: Path, family: int) -> None:
    for name in ("cgroup_ingress", "cgroup_egress"):
        hook = hooked(name)
        with datagrams(family) as (one, other):

            def send() -> None:
                one.sendto(b"x", other.getsockname())
                other.recv(10)

            fires(hook, hook.program.attach(f"cgroup:{cgroup}"), send)


def test_packets_in_either_direction(hooked: Open, cgroup: Path) -> None:
    """``SEC("cgroup/skb")`` leaves the direction open."""
    hook = hooked("cgroup_skb")
    with pytest.raises(bpf.BpfError, match="its section does not tell which"):
        hook.program.attach(f"cgroup:{cgroup}")
    with datagrams() as (one, other):

        def send() -> None:
            one.sendto(b"x", other.getsockname())
            other.recv(10)

        for direction in ("ingress", "egress"):
            fires(hook, hook.program.attach(f"cgroup:{cgroup}:{direction}"), send)


@pytest.mark.feature("hook", "cgroup: getpeername and getsockname")
@pytest.mark.parametrize(("version", "family"), [(4, V4), (6, V6)])
def test_names_of_sockets(hooked: Open, cgroup: Path, version: int, family: int) -> None:
    one, other = ends(family)
    with one, other:
        for name, ask in (
            (f"getpeername{version}", one.getpeername),
            (f"getsockname{version}", one.getsockname),
        ):
            hook = hooked(name)
            fires(hook, hook.program.attach_cgroup(cgroup), ask)


@pytest.mark.feature("hook", "cgroup: sockets made and released")
def test_socket_s_beginning_and_end(hooked: Open, cgroup: Path) -> None:
    for name in ("sock_create", "sock_release"):
        hook = hooked(name)
        fires(hook, hook.program.attach(f"cgroup:{cgroup}"), lambda: socket.socket().close())


@pytest.mark.feature("hook", "cgroup: getsockopt and setsockopt")
def test_options(hooked: Open, cgroup: Path) -> None:
    with socket.socket() as one:
        hook = hooked("setsockopt")
        fires(
            hook, hook.program.attach_cgroup(cgroup), lambda: one.setsockopt(socket.SOL_IP, socket.IP_TOS, 16)
        )
        hook = hooked("getsockopt")
        fires(hook, hook.program.attach_cgroup(cgroup), lambda: one.getsockopt(socket.SOL_IP, socket.IP_TOS))


@pytest.mark.feature("hook", "cgroup: sock_ops")
@pytest.mark.parametrize("family", [V4, V6])
def test_sock_ops(hooked: Open, cgroup: Path, family: int) -> None:
    """A connection is established twice: at the client and at the server."""
    hook = hooked("sock_ops")
    with listening(family) as server:
        link = hook.program.attach(f"cgroup:{cgroup}")
        with hook.more(10):
            for _ in range(5):
                connect(server)
        link.close()
        with hook.more(0):
            connect(server)


@pytest.mark.feature("hook", "cgroup: device")
def test_device(hooked: Open, cgroup: Path) -> None:
    hook = hooked("device")

    def look() -> None:
        with open("/dev/zero", "rb", buffering=0):
            pass

    for link in each(
        lambda: hook.program.attach(f"cgroup:{cgroup}:device"), lambda: hook.program.attach_cgroup(cgroup)
    ):
        fires(hook, link, look)


@pytest.mark.feature("hook", "cgroup: sysctl")
def test_sysctl(hooked: Open, cgroup: Path) -> None:
    hook = hooked("sysctl")

    def look() -> None:
        fd = os.open("/proc/sys/net/ipv4/ip_forward", os.O_RDONLY)
        os.read(fd, 10)
        os.close(fd)

    fires(hook, hook.program.attach(f"cgroup:{cgroup}"), look)


@pytest.mark.feature("hook", "cgroup: LSM")
def test_lsm_of_a_cgroup(hooked: Open, cgroup: Path) -> None:
    supported("lsm")
    hook = hooked("lsm_cgroup")
    fires(hook, hook.program.attach(f"cgroup:{cgroup}"), lambda: socket.socket().close())


def test_other_cgroups_are_not_counted(hooked: Open, cgroup: Path, unique_name: Callable[[], str]) -> None:
    hook = hooked("connect4")
    empty = bpf.cgroup_folder() / unique_name()
    empty.mkdir()
    try:
        with hook.program.attach_cgroup(empty), hook.more(0):
            connected(V4)
    finally:
        empty.rmdir()


def test_several_programs_on_one_hook(hooked: Open, cgroup: Path) -> None:
    first, second = hooked("connect4"), hooked("connect4")
    with first.program.attach_cgroup(cgroup), second.program.attach_cgroup(cgroup):
        held = bpf.query(f"cgroup:{cgroup}:connect4").programs
        assert [one.program_id for one in held] == [first.program.id, second.program.id]
        with first.more(1), second.more(1):
            connected(V4)


def test_a_program_that_does_not_share_is_named(hooked: Open, cgroup: Path) -> None:
    need("kernel", missing_program("bpftool"))
    theirs, ours = hooked("connect4"), hooked("connect4")
    words = [os.fspath(cgroup), "connect4", "id", str(theirs.program.id)]
    subprocess.run(["bpftool", "cgroup", "attach", *words], check=True)
    try:
        with pytest.raises(
            bpf.BpfError, match=r"does not share holds the hook.*bpftool cgroup tree"
        ) as caught:
            ours.program.attach_cgroup(cgroup)
        assert not isinstance(caught.value, bpf.NotPermitted)
        with theirs.more(1), ours.more(0):
            connected(V4)
    finally:
        subprocess.run(["bpftool", "cgroup", "detach", *words], check=True)


def test_update_pin_and_adopt(hooked: Open, cgroup: Path, pins: Path) -> None:
    first, second = hooked("connect4"), hooked("connect4")
    with first.program.attach_cgroup(cgroup) as link:
        link.update(second.program, expected=first.program)
        with first.more(0), second.more(1):
            connected(V4)
        with pytest.raises(bpf.LinkChanged, match=f"it holds program id {second.program.id}"):
            link.update(first.program, expected=first.program)
        link.pin(pins / "link")
    with bpf.Link.from_pin(pins / "link") as adopted, second.more(1):
        connected(V4)
        with bpf.Link.from_id(adopted.id) as same:
            assert same.info == adopted.info
        adopted.update(first.program)
    with first.more(1):
        connected(V4)
    with bpf.Link.from_pin(pins / "link") as adopted:
        adopted.detach()
    with first.more(0):
        connected(V4)


def test_no_cgroup(hooked: Open, tmp_path: Path) -> None:
    program = hooked("connect4").program
    with pytest.raises(bpf.BpfError, match=r"there is no cgroup absent.*cgroup v2 is at"):
        program.attach_cgroup("absent")
    with pytest.raises(bpf.BpfError, match="no folder of cgroup v2"):
        program.attach_cgroup(tmp_path)
    with pytest.raises(
        bpf.BpfError, match=r"no hook of a cgroup 'conect4': there are ingress.*\(did you mean connect4\?\)"
    ):
        program.attach_cgroup("absent", "conect4")
    with pytest.raises(bpf.BpfError, match=r"the one that it was loaded for"):
        program.attach_cgroup(bpf.cgroup_folder(), "connect6")


def test_an_adopted_program_does_not_know_its_hook(hooked: Open, cgroup: Path) -> None:
    hook = hooked("connect4")
    with bpf.Program.from_id(hook.program.id) as adopted:
        with pytest.raises(bpf.BpfError, match=r"the kernel does not tell which.*connect4"):
            adopted.attach_cgroup(cgroup)
        with adopted.attach_cgroup(cgroup, "connect4") as link, hook.more(1), contextlib.closing(link):
            connected(V4)
