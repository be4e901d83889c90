"""Which hook each function of the data path uses: its hooks in order of preference, and the first that this kernel has.

The data path asks here when it attaches, and ``hookline doctor`` shows the same answers with their reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hookline.bpf import features
from hookline.bpf.features import Answer, Finding

__all__ = ["CONNECT_TIME", "ENDING", "FUNCTIONS", "Choice", "Function", "Preference", "choose"]


@dataclass(frozen=True)
class Preference:
    """A hook that a function can use.

    Attributes:
        hook: Its name, such as ``"tcx"``.
        gives: What is had by it, beside those that come after it.
        needs: Asks for all that it takes.
    """

    hook: str
    gives: str
    needs: tuple[Callable[[], Finding], ...]


@dataclass(frozen=True)
class Function:
    """A function of the data path.

    Attributes:
        name: Such as ``"firewall"``.
        hooks: In order of preference.
        capabilities: What a process needs to load and attach it.
    """

    name: str
    hooks: tuple[Preference, ...]
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The hook that a function uses here.

    Attributes:
        function: The function's name.
        hook: The first whose needs are all met; where that could not be told, the first that may be; ``""`` for none.
        certain: Whether it is known that the kernel has it.
        why: Why this one: what it gives, or what could not be told.
        passed_over: The better ones, each with what was found missing.
    """

    function: str
    hook: str
    certain: bool
    why: str
    passed_over: tuple[tuple[str, Finding], ...]


def _attach(name: str) -> Callable[[], Finding]:
    return lambda: features.attach(name)


def _qdisc(kind: str) -> Callable[[], Finding]:
    return lambda: features.qdisc(kind)


def _kfunc(name: str) -> Callable[[], Finding]:
    return lambda: features.kfunc(name)


def _config(option: str) -> Callable[[], Finding]:
    return lambda: _configured(option)


def _configured(option: str) -> Finding:
    """What the kernel's configuration says of an option; it may not be readable."""
    value = features.config(option)
    if value is None:
        return Finding(option, Answer.UNKNOWN, "the kernel's configuration cannot be read", config=(option,))
    if value == "n":
        return Finding(option, Answer.NO, f"{option} is not set", config=(option,))
    return Finding(option, Answer.YES, f"{option}={value}", config=(option,))


CONNECT_TIME = "services at connect time"
ENDING = "ending of sockets"

_TC = (
    Preference(
        "tcx", "links: order, atomic update, nothing left behind by a process that dies", (_attach("tcx"),)
    ),
    Preference("clsact", "filters of a queueing discipline", (_attach("clsact"), _qdisc("cls_bpf"))),
)
_NETWORK = ("CAP_BPF", "CAP_NET_ADMIN")
_TRACING = ("CAP_BPF", "CAP_PERFMON")

FUNCTIONS: tuple[Function, ...] = (
    Function(
        "load balancer", (Preference("XDP", "before the stack sees a packet", (_attach("xdp"),)),), _NETWORK
    ),
    Function("firewall", _TC, _NETWORK),
    Function(
        "shaper",
        (
            Preference(
                "EDT + fq", "each packet its own time to leave; no lock", (_attach("tcx"), _qdisc("fq"))
            ),
            Preference(
                "EDT + fq by clsact",
                "the same by filters",
                (_attach("clsact"), _qdisc("cls_bpf"), _qdisc("fq")),
            ),
            Preference("HTB", "classes of a queueing discipline, one lock", (_qdisc("htb"),)),
            Preference(
                "police", "drops what is too much, without a queue", (_attach("clsact"), _qdisc("police"))
            ),
        ),
        _NETWORK,
    ),
    Function(
        "monitor",
        (
            Preference(
                "socket filter", "copies of packets, nothing in their way", (_attach("socket_filter"),)
            ),
        ),
        ("CAP_BPF", "CAP_NET_RAW"),
    ),
    Function(
        "tracer",
        (
            Preference("fentry", "arguments by their types, the least cost", (_attach("fentry"),)),
            Preference("kprobe", "any function, arguments by registers", (_attach("kprobe"),)),
            Preference("tracepoint", "the places that the kernel keeps stable", (_attach("tracepoint"),)),
        ),
        _TRACING,
    ),
    Function(
        "latency tracker",
        (
            Preference("tp_btf", "tracepoints with typed arguments", (_attach("tp_btf"),)),
            Preference("raw tracepoint", "tracepoints with bare arguments", (_attach("raw_tracepoint"),)),
            Preference("tracepoint", "tracepoints by their formatted records", (_attach("tracepoint"),)),
        ),
        _TRACING,
    ),
    Function(
        CONNECT_TIME,
        (
            Preference(
                "cgroup links",
                "the service's address exchanged when the application says it, nothing in the packets' way",
                tuple(
                    _attach(f"cgroup/{hook}{version}")
                    for hook in ("connect", "sendmsg", "recvmsg", "getpeername")
                    for version in (4, 6)
                ),
            ),
        ),
        _NETWORK,
    ),
    Function(
        ENDING,
        (
            Preference(
                "bpf_sock_destroy in iterators",
                "each socket looked at and ended in one walk",
                (_attach("iter"), _kfunc("bpf_sock_destroy")),
            ),
            Preference(
                "SOCK_DESTROY",
                "one netlink message for each socket that an iterator has found",
                (_attach("iter"), _config("CONFIG_INET_DIAG_DESTROY")),
            ),
        ),
        ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"),
    ),
    Function(
        "sockets",
        (
            Preference(
                "sockmap links",
                "sockets spliced, by links",
                (_attach("sockops"), _attach("sk_msg"), _attach("sockmap links")),
            ),
            Preference(
                "sockmap",
                "the same; what is on a sockmap stays when a process dies",
                (_attach("sockops"), _attach("sk_msg")),
            ),
        ),
        _NETWORK,
    ),
)


def choose(function: Function, *, interface: str = "") -> Choice:
    """The hook that a function uses on this kernel.

    Args:
        function: One of `FUNCTIONS`.
        interface: For the load balancer: the interface whose driver is asked for native XDP.

    Raises:
        BpfError: There is no such interface.
    """
    passed: list[tuple[str, Finding]] = []
    for preference in _of(function, interface):
        found = _together(preference)
        if found.answer is Answer.NO:
            passed.append((preference.hook, found))
            continue
        certain = found.answer is Answer.YES
        why = preference.gives if certain else f"could not tell: {found.why}"
        return Choice(function.name, preference.hook, certain, why, tuple(passed))
    return Choice(function.name, "", True, "the kernel has none of its hooks", tuple(passed))


def _of(function: Function, interface: str) -> tuple[Preference, ...]:
    if function.name != "load balancer" or not interface:
        return function.hooks
    (xdp,) = function.hooks
    return (
        Preference(
            f"native XDP on {interface}",
            "in the driver, before a packet has a socket buffer",
            (*xdp.needs, lambda: features.native_xdp(interface)),
        ),
        Preference(f"generic XDP on {interface}", "after a packet has become a socket buffer", xdp.needs),
    )


def _together(preference: Preference) -> Finding:
    """The first no among what a hook needs, else the first that could not be told, else a yes."""
    found = [ask() for ask in preference.needs]
    for answer in (Answer.NO, Answer.UNKNOWN):
        for one in found:
            if one.answer is answer:
                return one
    return found[0]
