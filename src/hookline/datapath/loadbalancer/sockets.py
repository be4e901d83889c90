"""Sockets that were given a backend when they connected: which there are, and the end of those whose backend is gone.

A socket's own record (``datapath/include/peers.h``) says which row of ``backends`` it was given, and in which generation of
that row. Only TCP sockets and connected UDP sockets count, and only while they are connected to the very address of that
record: never a socket that listens, an unconnected datagram socket, or one that a program connected to the same address itself.

Which sockets there are is read from the records, in all network namespaces at once. They are ended from inside each namespace
that has one of them: by ``bpf_sock_destroy`` in an iterator (Linux 6.5), else by the netlink message ``SOCK_DESTROY``, which
names the socket by its addresses and its cookie. The application sees ECONNABORTED.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hookline import bpf, net
from hookline.bpf import features
from hookline.datapath.loadbalancer._object import DESTROY, object_bytes

Address = IPv4Address | IPv6Address
Row = tuple[int, int]
"""A row of ``backends`` and its generation."""

_TCP, _UDP = 6, 17
_PROGRAMS = {_TCP: "destroy_tcp", _UDP: "destroy_udp"}


@dataclass(frozen=True, slots=True)
class Destroyed:
    """What became of the sockets of backends that are gone.

    Attributes:
        tcp: TCP sockets that were ended.
        udp: Connected UDP sockets that were ended.
        left: Sockets that could not be ended, with the reason.
    """

    tcp: int = 0
    udp: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tcp or self.udp or self.left)


class Records:
    """The walk over sockets' records, loaded once and used many times. Close it, or use it as a context manager.

    Loading takes tens of milliseconds; a walk where no socket has a record some microseconds.

    Args:
        sockets: The load balancer's map of that name; it is kept open by the kernel.

    Raises:
        bpf.BpfError: The kernel refuses the iterator.
    """

    def __init__(self, sockets: bpf.Map) -> None:
        with bpf.Object.open(object_bytes(DESTROY), name="destroy") as obj:
            obj.only("list_sockets")
            obj.reuse("sockets", sockets)
            obj.load()
            self._entry = obj.btf.struct("live_socket")
            # The link keeps its program and map.
            self._walk = obj.programs["list_sockets"].attach_iterator(map=sockets)

    def close(self) -> None:
        """Lets go of the link, and with it of the program."""
        self._walk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self) -> NDArray[np.void]:
        """Every socket that is connected to a backend that it was given, in all network namespaces.

        Returns:
            ``struct live_socket``, shape (n,): ports and addresses in network byte order.

        Raises:
            bpf.BpfError: The kernel refuses the walk.
        """
        return _whole(self._walk.read(), self._entry)


def live_sockets(sockets: bpf.Map) -> NDArray[np.void]:
    """Every socket that is connected to a backend that it was given; see `Records.read`.

    Args:
        sockets: The load balancer's map of that name.

    Raises:
        bpf.BpfError: The kernel refuses the iterator.
    """
    with Records(sockets) as records:
        return records.read()


def count_sockets(sockets: bpf.Map) -> dict[Row, int]:
    """How many sockets are connected to each backend, by row and generation; changes nothing.

    Args:
        sockets: The load balancer's map of that name.

    Raises:
        bpf.BpfError: The kernel refuses the iterator.
    """
    found = live_sockets(sockets)
    return dict(Counter(zip(found["backend"].tolist(), found["generation"].tolist(), strict=True)))


def destroy_sockets(
    sockets: bpf.Map, rows: Mapping[Row, tuple[Address, int]], *, netlink: bool | None = None
) -> Destroyed:
    """Ends the sockets that are connected to these backends.

    Args:
        sockets: The load balancer's map of that name.
        rows: Address and port of each backend by its row and generation, as they were when the sockets connected.
        netlink: True: by ``SOCK_DESTROY``; False: by an iterator; None: by what the kernel has, an iterator first.

    Raises:
        bpf.BpfError: The kernel refuses the iterators.
    """
    if not rows:
        return Destroyed()
    if netlink is None:
        netlink = features.kfunc("bpf_sock_destroy").answer is features.Answer.NO
    with bpf.Object.open(object_bytes(DESTROY), name="destroy") as obj:
        if netlink:
            obj.only("list_sockets")
        else:
            obj.constants["has_sock_destroy"] = 1
        obj.reuse("sockets", sockets)
        obj.resize("doomed", len(rows))
        obj.load()
        found = _walk(obj, sockets)
        doomed = _doomed(found, rows)
        if not len(doomed):
            return Destroyed()
        left: Counter[str] = Counter()
        ended: Counter[int] = Counter()
        if not netlink:
            _write_doomed(obj.maps["doomed"], rows)
        for namespace in np.unique(doomed["netns"]).tolist():
            here = doomed[doomed["netns"] == namespace]
            try:
                place = net.find(namespace)
                if place is None:
                    left["no process is in their network namespace any more"] += len(here)
                    continue
                with net.inside(place):
                    if netlink:
                        ended += _by_netlink(here, left)
                    else:
                        _by_iterators(obj, set(here["protocol"].tolist()))
            except net.NetworkError as error:
                left[error.why or error.what] += len(here)
        if not netlink:
            _, counts = obj.maps["doomed"].read()
            ended = Counter({_TCP: int(counts["tcp"].sum()), _UDP: int(counts["udp"].sum())})
            if failed := int(counts["failed"].sum()):
                left["the kernel did not end them"] += failed
        return Destroyed(ended[_TCP], ended[_UDP], dict(left))


def _walk(obj: bpf.Object, sockets: bpf.Map) -> NDArray[np.void]:
    with obj.programs["list_sockets"].attach_iterator(map=sockets) as walk:
        return _whole(walk.read(), obj.btf.struct("live_socket"))


def _whole(raw: bytes, entry: np.dtype[np.void]) -> NDArray[np.void]:
    """The records of a walk, without those that changed while they were read."""
    found: NDArray[np.void] = np.frombuffer(raw, entry)
    # What is neither protocol's is no connection that a backend was given.
    known: NDArray[np.void] = found[np.isin(found["protocol"], tuple(_PROGRAMS))]
    return known


def _doomed(found: NDArray[np.void], rows: Mapping[Row, tuple[Address, int]]) -> NDArray[np.void]:
    """Those whose record and remote address are a row's."""
    wanted = {(*row, _mapped(address), port) for row, (address, port) in rows.items()}
    keys = zip(
        found["backend"].tolist(),
        found["generation"].tolist(),
        (entry.tobytes() for entry in found["remote"]),
        found["remote_port"].byteswap().tolist(),
        strict=True,
    )
    chosen: NDArray[np.void] = found[np.fromiter((key in wanted for key in keys), bool, len(found))]
    return chosen


def _write_doomed(table: bpf.Map, rows: Mapping[Row, tuple[Address, int]]) -> None:
    for (row, generation), (address, port) in rows.items():
        value = np.zeros((), table.value_dtype)
        value["address"]["words"] = np.frombuffer(_mapped(address), np.uint32)
        value["port"] = np.uint16(port).byteswap()
        table[{"backend": row, "generation": generation}] = value


def _by_iterators(obj: bpf.Object, protocols: Iterable[int]) -> None:
    """Walks this network namespace's sockets; the programs end those of doomed backends."""
    for protocol in protocols:
        with obj.programs[_PROGRAMS[protocol]].attach_iterator() as walk:
            walk.read()


def _by_netlink(here: NDArray[np.void], left: Counter[str]) -> Counter[int]:
    """Ends these sockets of this network namespace, one message each."""
    ended: Counter[int] = Counter()
    for protocol in _PROGRAMS:
        names = [
            net.SocketName.of(
                int(entry["family"]),
                protocol,
                (entry["local"].tobytes(), int(entry["local_port"].byteswap())),
                (entry["remote"].tobytes(), int(entry["remote_port"].byteswap())),
                int(entry["cookie"]),
            )
            for entry in here[here["protocol"] == protocol]
        ]
        ended[protocol], not_ended = net.destroy_sockets(names)
        left.update(not_ended)
    return ended


def _mapped(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
