"""`hookline.net` on namespaces of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from hookline import net
from hookline.net import NetworkError

HERE, THERE = ip_address("10.0.0.1"), ip_address("10.0.0.2")
HERE_6, THERE_6 = ip_address("fd00::1"), ip_address("fd00::2")


@pytest.fixture
def pair(unique_name: Callable[[], str]) -> Iterator[tuple[Path, Path]]:
    """Two namespaces with a link between them, ``eth0`` at both ends; only the first end has addresses."""
    names = unique_name(), unique_name()
    try:
        first, second = (net.create(name) for name in names)
        for namespace in (first, second):
            with net.inside(namespace):
                net.write_sysctls({"ipv6/conf/all/accept_dad": 0, "ipv6/conf/default/accept_dad": 0})
        descriptor = os.open(second, os.O_RDONLY)
        with net.Netlink(first) as netlink:
            netlink.apply([net.add_veth("eth0", 2, "eth0", 2, descriptor), net.set_up(1), net.set_up(2)])
            netlink.apply([net.add_address(2, HERE, 24), net.add_address(2, HERE_6, 64)])
        os.close(descriptor)
        with net.Netlink(second) as netlink:
            netlink.apply([net.set_up(1), net.set_up(2)])
        yield first, second
    finally:
        for name in names:
            net.delete(name)


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_inside_comes_back_however_the_block_ends(pair: tuple[Path, Path]) -> None:
    before = here()
    with net.inside(pair[0]):
        assert here() == pair[0].stat().st_ino
        with net.inside(pair[1]):
            assert here() == pair[1].stat().st_ino
        with net.inside(None):
            assert here() == pair[0].stat().st_ino
    assert here() == before
    with pytest.raises(ZeroDivisionError), net.inside(pair[0]):
        raise ZeroDivisionError
    assert here() == before


def test_inside_moves_its_own_thread_only(pair: tuple[Path, Path]) -> None:
    moved, seen = threading.Event(), list[int]()

    def look() -> None:
        moved.wait(5)
        seen.append(here())

    thread = threading.Thread(target=look)
    thread.start()
    with net.inside(pair[0]):
        moved.set()
        thread.join()
    assert seen == [here()]


def test_a_namespace_that_is_not_there(unique_name: Callable[[], str]) -> None:
    before = here()
    with (
        pytest.raises(NetworkError, match="none of that name") as raised,
        net.inside(net.NETNS_DIR / unique_name()),
    ):
        pass
    assert raised.value.remedy
    assert here() == before
    assert net.delete(unique_name()) is False


def test_a_namespace_of_a_name_that_is_taken(pair: tuple[Path, Path]) -> None:
    before = here()
    with pytest.raises(NetworkError, match="there is one of that name"):
        net.create(pair[0].name)
    assert here() == before
    assert set(net.list_names(pair[0].name)) >= {pair[0].name}


def test_interfaces(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        lo, eth0 = net.interfaces()
        assert (lo.name, lo.kind, lo.index) == ("lo", "loopback", 1)
        assert (eth0.name, eth0.kind, eth0.index, eth0.up, eth0.mtu) == ("eth0", "veth", 2, True, 1500)
        assert {"10.0.0.1/24", "fd00::1/64"} <= {str(address) for address in eth0.addresses}
        assert net.interface_index("eth0") == 2
        with pytest.raises(NetworkError, match="no interface eth9") as raised:
            net.interface_index("eth9")
        assert "lo, eth0" in raised.value.why


def test_routes(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        assert net.route_to(THERE) == net.Route("eth0", None, HERE, "unicast")
        assert net.route_to(HERE).kind == "local"
        assert net.route_to(ip_address("192.0.2.1")) == net.Route("", None, None, "unreachable")
        assert net.route_to(ip_address("2001:db8::1")).kind == "unreachable"
        with pytest.raises(NetworkError, match="no default route") as raised:
            net.default_interface()
        assert "NodeConfig" in raised.value.remedy
        with net.Netlink() as netlink:
            netlink.apply(
                [
                    net.add_route(ip_network("0.0.0.0/0"), 2, via=THERE),
                    net.add_route(ip_network("2001:db8::/32"), 2, via=THERE_6),
                    net.add_route(ip_network("198.51.100.0/24")),
                    net.add_route(ip_network("2001:db8:1::/48")),
                ]
            )
            assert net.route_to(ip_address("192.0.2.1")) == net.Route("eth0", THERE, HERE, "unicast")
            assert net.route_to(ip_address("2001:db8::1")) == net.Route("eth0", THERE_6, HERE_6, "unicast")
            assert net.route_to(ip_address("198.51.100.1")).kind == "unreachable"
            assert net.route_to(ip_address("2001:db8:1::1")).kind == "unreachable"
            assert net.default_interface() == "eth0"
            netlink.apply([net.delete_route(ip_network("0.0.0.0/0"))] * 2)
            assert net.route_to(ip_address("192.0.2.1")).kind == "unreachable"


def test_a_failed_change_says_which_and_why(pair: tuple[Path, Path]) -> None:
    with net.Netlink(pair[0]) as netlink:
        with pytest.raises(NetworkError, match="cannot switch on interface 99: ") as raised:
            netlink.apply([net.set_up(99), net.add_address(2, ip_address("10.0.0.9"))])
        assert raised.value.errno
    with net.inside(pair[0]):
        assert net.route_to(ip_address("10.0.0.9")).kind == "local", "the other change was made"


def test_neighbours_that_the_kernel_keeps(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        net.keep_resolved(THERE, "eth0")
        net.keep_resolved(THERE_6, 2)
        assert {one.address for one in net.neighbours() if one.managed} == {THERE, THERE_6}
        net.keep_resolved(THERE, "eth0")
        time.sleep(0.1)
        assert all(one.mac == "" for one in net.neighbours() if one.managed), "nobody has the addresses yet"
    with net.Netlink(pair[1]) as netlink:
        netlink.apply([net.add_address(2, THERE, 24), net.add_address(2, THERE_6, 64)])
    with net.inside(pair[0]):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            resolved = {one.address for one in net.neighbours() if one.managed and one.mac}
            if resolved == {THERE, THERE_6}:
                break
            time.sleep(0.1)
        assert resolved == {THERE, THERE_6}, "the kernel asks again by itself"
        for address in (THERE, THERE_6, THERE_6):
            net.forget(address, "eth0")
        assert not {THERE, THERE_6} & {one.address for one in net.neighbours()}


def test_offloads(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        assert net.offloads("eth0").tx_checksum
        net.set_offloads("eth0", gro=True, tx_checksum=False)
        assert net.offloads("eth0") == net.Offloads(gro=True, tx_checksum=False, tso=False)
        net.set_offloads("eth0", gro=False, tx_checksum=True)
        assert net.offloads("eth0") == net.Offloads(gro=False, tx_checksum=True, tso=True)
        with pytest.raises(NetworkError, match="eth9"):
            net.set_offloads("eth9", gro=True)
        with pytest.raises(NetworkError, match="lo"):
            net.set_offloads("lo", tx_checksum=False)


def test_settings(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        net.write_sysctls({"ipv4/ip_forward": 1})
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"
        with pytest.raises(NetworkError, match="net/ipv4/no_such_thing"):
            net.write_sysctls({"ipv4/no_such_thing": 1})


def test_the_id_of_another_namespace(pair: tuple[Path, Path]) -> None:
    with net.inside(pair[0]):
        names = [one.name for one in net.interfaces() if one.kind == "veth"]
        numbers = net.link_numbers(names[0])
        assert numbers["netns"] == net.id_here(pair[1]) >= 0
    with net.inside(pair[1]):
        assert any(one.index == numbers["iflink"] for one in net.interfaces())
        assert net.link_numbers("nothing") == {}
    with pytest.raises(OSError, match="No such file"):
        net.id_here(Path("/run/netns/nothing-like-that"))
