"""Where to attach, as text: what a command line takes, and what a program's section says.

A target is ``KIND[:WHERE]``. A section says the same thing in libbpf's way (``SEC("kprobe/tcp_connect")``) and is
rewritten as a target; sections that leave the place open (``SEC("xdp")``) need one.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookline.bpf._arguments import one_of
from hookline.bpf._errors import BpfError, TargetError
from hookline.bpf._links import _attach_cgroup, _attach_netfilter, _attach_trace

if TYPE_CHECKING:
    from hookline.bpf._links._clsact import ClsactFilter
    from hookline.bpf._links._group import LinkGroup
    from hookline.bpf._links._link import Link
    from hookline.bpf._programs._program import Program

__all__ = ["TARGETS", "attach", "from_section", "target_forms", "target_types"]


@dataclass(frozen=True)
class _Target:
    """A kind of target: how it is written, for which program types, and what attaches to it."""

    form: str
    types: tuple[str, ...]
    attach: Callable[[Program, str], Link | ClsactFilter | LinkGroup]


def attach(program: Program, target: str) -> Link | ClsactFilter | LinkGroup:
    """Attach by a target's text, or by the section; see `Program.attach`."""
    if "\0" in target:
        raise TargetError(
            f"{target!r} is no place to attach to",
            why="it has a zero byte",
            remedy="leave the byte out: no name of the kernel has one",
        )
    text = target or from_section(program.section)
    _, _, where = text.partition(":")
    if not text:
        raise _unplaced(program)
    kind, chosen = _kind(text, _forms(program))
    if program.type not in chosen.types:
        raise BpfError(
            f"cannot attach program {program.name!r} to {text}",
            why=f"it is of type {program.type}, and {kind} takes {' or '.join(chosen.types)}",
            remedy=f"write {_forms(program)}" if _forms(program) else _otherwise(program),
        )
    return chosen.attach(program, where)


def target_types(target: str) -> tuple[str, ...]:
    """The program types that a target takes: ``("xdp",)`` for ``"xdp:eth0"``.

    Raises:
        TargetError: It is no target; the error lists the kinds.
    """
    return _kind(target, "")[1].types


def target_forms(program_type: str) -> tuple[str, ...]:
    """How the targets are written that take programs of a type: ``("xdp:IFACE[:native|generic|offload]",)`` for ``"xdp"``."""
    return tuple(target.form for target in _TARGETS.values() if program_type in target.types)


def from_section(section: str) -> str:
    """The target that a section names, or an empty text where it leaves the place open."""
    kind, _, rest = section.partition("/")
    kind = kind.removesuffix(".s").removesuffix(".w")
    match kind:
        case "tracepoint" | "tp":
            return f"tracepoint:{rest}" if rest else ""
        case "raw_tracepoint" | "raw_tp":
            return f"raw_tracepoint:{rest}" if rest else ""
        case "kprobe" | "kretprobe" | "kprobe.multi" | "kretprobe.multi" | "ksyscall" | "kretsyscall":
            return f"{kind}:{rest}" if rest else ""
        case "uprobe" | "uretprobe" | "uprobe.multi" | "uretprobe.multi":
            return f"{kind}:{rest}" if rest else ""
        case "fentry" | "fexit" | "fmod_ret" | "tp_btf" | "freplace" | "lsm":
            return "tracing"
        case "iter":
            return "iterator"
        case "sk_lookup" | "flow_dissector":
            return "netns"
    return ""


# One function for each kind of target


def _xdp(program: Program, where: str) -> Link:
    interface, _, mode = where.partition(":")
    modes = {"": "auto", "auto": "auto", "native": "native", "generic": "generic", "offload": "offload"}
    chosen = one_of(modes, mode, "mode of XDP")
    return program.attach_xdp(_required(interface, "xdp"), chosen)  # type: ignore[arg-type]


def _traffic_control(hook: str) -> Callable[[Program, str], Link | ClsactFilter]:
    def attach_tc(program: Program, where: str) -> Link | ClsactFilter:
        interface, _, direction = where.partition(":")
        interface = _required(interface, hook)
        if not direction and program.section.startswith(("tcx/", "tc/")):
            direction = program.section.partition("/")[2]
        one_of({"ingress": 0, "egress": 1}, direction, "direction")
        way = "auto" if hook == "tc" else hook
        return program.attach_tc(interface, direction, hook=way)  # type: ignore[arg-type]

    return attach_tc


def _netkit(program: Program, where: str) -> Link:
    interface, _, end = where.partition(":")
    if not end and program.section.startswith("netkit/"):
        end = program.section.partition("/")[2]
    one_of({"primary": 0, "peer": 1}, end, "end of a netkit pair")
    return program.attach_netkit(_required(interface, "netkit"), end)  # type: ignore[arg-type]


def _netfilter(program: Program, where: str) -> Link:
    words = where.split(":")
    family = words.pop(0) if words[0] in ("ipv4", "ipv6") else "ipv4"
    hook = words.pop(0) if words else ""
    one_of(_attach_netfilter.NETFILTER_HOOKS, hook, "netfilter hook")
    priority = _number(words.pop(0), "priority") if words else 0
    _end(words, "netfilter")
    return program.attach_netfilter(family, hook, priority)  # type: ignore[arg-type]


def _cgroup(program: Program, where: str) -> Link:
    path, colon, hook = where.rpartition(":")
    if not colon or (hook not in _attach_cgroup.CGROUP_HOOKS and "/" in hook):
        path, hook = where, ""
    return program.attach_cgroup(_required(path, "cgroup"), hook or None)


def _netns(program: Program, where: str) -> Link:
    return program.attach_netns(where or None)


def _tracepoint(program: Program, where: str) -> Link:
    return program.attach_tracepoint(_required(where, "tracepoint"))


def _raw_tracepoint(program: Program, where: str) -> Link:
    return program.attach_raw_tracepoint(_required(where, "raw_tracepoint"))


def _kprobe(returns: bool) -> Callable[[Program, str], Link]:
    def attach_kprobe(program: Program, where: str) -> Link:
        function, offset = _with_offset(_required(where, "kprobe"))
        return program.attach_kprobe(function, offset=offset, returns=returns)

    return attach_kprobe


def _ksyscall(returns: bool) -> Callable[[Program, str], Link]:
    def attach_ksyscall(program: Program, where: str) -> Link:
        function = _attach_trace.system_call(_required(where, "ksyscall"))
        return program.attach_kprobe(function, returns=returns)

    return attach_ksyscall


def _kprobe_multi(returns: bool) -> Callable[[Program, str], Link]:
    def attach_multi(program: Program, where: str) -> Link:
        return program.attach_kprobe_multi(_many(_required(where, "kprobe.multi")), returns=returns)

    return attach_multi


def _uprobe(returns: bool) -> Callable[[Program, str], Link]:
    def attach_uprobe(program: Program, where: str) -> Link:
        path, function = _path_and(where, "uprobe")
        name, offset = _with_offset(function)
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", name):
            return program.attach_uprobe(path, int(name, 0), offset=offset, returns=returns)
        return program.attach_uprobe(path, name, offset=offset, returns=returns)

    return attach_uprobe


def _uprobe_multi(returns: bool) -> Callable[[Program, str], Link]:
    def attach_multi(program: Program, where: str) -> Link:
        path, functions = _path_and(where, "uprobe.multi")
        return program.attach_uprobe_multi(path, _many(functions), returns=returns)

    return attach_multi


def _perf(program: Program, where: str) -> LinkGroup:
    event, _, rate = where.partition(":")
    frequency_hz = _number(rate, "frequency in hertz") if rate else 0
    return program.attach_perf_event(event or "cpu-clock", frequency_hz=frequency_hz)


def _tracing(program: Program, where: str) -> Link:
    return program.attach_tracing()


def _iterator(program: Program, where: str) -> Link:
    return program.attach_iterator()


_CGROUP = _attach_cgroup.CGROUP_TYPES
_TARGETS = {
    "xdp": _Target("xdp:IFACE[:native|generic|offload]", ("xdp",), _xdp),
    "tc": _Target("tc:IFACE:ingress|egress", ("sched_cls",), _traffic_control("tc")),
    "tcx": _Target("tcx:IFACE:ingress|egress", ("sched_cls",), _traffic_control("tcx")),
    "clsact": _Target("clsact:IFACE:ingress|egress", ("sched_cls",), _traffic_control("clsact")),
    "netkit": _Target("netkit:IFACE:primary|peer", ("sched_cls",), _netkit),
    "netfilter": _Target("netfilter:[ipv4:|ipv6:]HOOK[:PRIORITY]", ("netfilter",), _netfilter),
    "cgroup": _Target("cgroup:PATH[:HOOK]", _CGROUP, _cgroup),
    "netns": _Target("netns[:PATH]", ("sk_lookup", "flow_dissector"), _netns),
    "tracepoint": _Target("tracepoint:GROUP/NAME", ("tracepoint",), _tracepoint),
    "raw_tracepoint": _Target(
        "raw_tracepoint:NAME", ("raw_tracepoint", "raw_tracepoint_writable"), _raw_tracepoint
    ),
    "kprobe": _Target("kprobe:FUNCTION[+OFFSET]", ("kprobe",), _kprobe(returns=False)),
    "kretprobe": _Target("kretprobe:FUNCTION", ("kprobe",), _kprobe(returns=True)),
    "ksyscall": _Target("ksyscall:NAME", ("kprobe",), _ksyscall(returns=False)),
    "kretsyscall": _Target("kretsyscall:NAME", ("kprobe",), _ksyscall(returns=True)),
    "kprobe.multi": _Target("kprobe.multi:PATTERN", ("kprobe",), _kprobe_multi(returns=False)),
    "kretprobe.multi": _Target("kretprobe.multi:PATTERN", ("kprobe",), _kprobe_multi(returns=True)),
    "uprobe": _Target("uprobe:PATH:FUNCTION[+OFFSET]", ("kprobe",), _uprobe(returns=False)),
    "uretprobe": _Target("uretprobe:PATH:FUNCTION", ("kprobe",), _uprobe(returns=True)),
    "uprobe.multi": _Target("uprobe.multi:PATH:PATTERN", ("kprobe",), _uprobe_multi(returns=False)),
    "uretprobe.multi": _Target("uretprobe.multi:PATH:PATTERN", ("kprobe",), _uprobe_multi(returns=True)),
    "perf": _Target("perf:EVENT[:HERTZ]", ("perf_event",), _perf),
    "tracing": _Target("tracing", ("tracing", "lsm", "ext"), _tracing),
    "iterator": _Target("iterator", ("tracing",), _iterator),
}

TARGETS = tuple(target.form for target in _TARGETS.values())
"""How each kind of target is written."""


# What is wrong with a text


def _kind(text: str, forms: str) -> tuple[str, _Target]:
    """A target's kind; where there is none such, an error that lists the given forms, or all."""
    kind = text.partition(":")[0]
    if kind in _TARGETS:
        return kind, _TARGETS[kind]
    close = difflib.get_close_matches(kind, _TARGETS, 1)
    if forms or close:
        remedy = (f"did you mean {close[0]}? " if close else "") + f"Write {forms or _TARGETS[close[0]].form}"
    else:
        remedy = "write KIND:WHERE, such as xdp:eth0, tc:eth0:ingress, tracepoint:sched/sched_switch"
    raise TargetError(
        f"{text!r} is no place to attach to",
        why=textwrap.fill(f"the kinds of places are {', '.join(_TARGETS)}", 88),
        remedy=remedy,
    )


def _forms(program: Program) -> str:
    """The targets that take the program."""
    return ", ".join(target_forms(program.type))


def _otherwise(program: Program) -> str:
    """How a program is used that attaches to nothing that can be written."""
    return {
        "syscall": "it attaches to nothing: run() runs it",
        "socket_filter": "give it a socket: attach_socket, attach_socket_of",
        "sk_reuseport": "give it a socket: attach_socket",
        "sk_msg": "give it a map: attach_sockmap",
        "sk_skb": "give it a map: attach_sockmap",
    }.get(program.type, "there is no text for its hook")


def _unplaced(program: Program) -> BpfError:
    section = f"its section {program.section!r} leaves that open" if program.section else "it was adopted"
    forms = _forms(program)
    return BpfError(
        f"cannot tell where to attach program {program.name!r}",
        why=section,
        remedy=f"say where: {forms}" if forms else _otherwise(program),
    )


def _required(text: str, kind: str) -> str:
    if not text:
        raise TargetError(
            f"{kind!r} does not say where", why="the place is missing", remedy=f"write {_TARGETS[kind].form}"
        )
    return text


def _end(words: list[str], kind: str) -> None:
    if words:
        raise TargetError(
            f"{':'.join(words)!r} is too much",
            why="nothing follows there",
            remedy=f"write {_TARGETS[kind].form}",
        )


def _path_and(where: str, kind: str) -> tuple[str, str]:
    path, _, rest = where.rpartition(":")
    if not path or not rest:
        raise TargetError(
            f"{where!r} is no PATH:FUNCTION",
            why="one of the two is missing",
            remedy=f"write {_TARGETS[kind].form}",
        )
    return path, rest


def _with_offset(text: str) -> tuple[str, int]:
    name, plus, offset = text.partition("+")
    return name, _number(offset, "offset") if plus else 0


def _number(text: str, what: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise TargetError(
            f"{text!r} is no {what}", why="it is no number", remedy="write a number, such as 16 or 0x10"
        ) from None


def _many(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text
