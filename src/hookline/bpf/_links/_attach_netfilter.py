"""Onto netfilter's hooks, between iptables' and nftables' (Linux 6.4)."""

from __future__ import annotations

import errno as errnos
import socket
from typing import Literal

from hookline.bpf._arguments import one_of
from hookline.bpf._errors import BpfError, FeatureMissing
from hookline.bpf._links._link import Link, create, expect_type, made
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType

__all__ = ["NETFILTER_HOOKS", "attach_netfilter"]

NETFILTER_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
"""``enum nf_inet_hooks``."""

_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}  # NFPROTO_* have the same numbers
_DEFRAGMENT = 1
_RESERVED = (-(1 << 31), (1 << 31) - 1)


def attach_netfilter(
    program: ProgramHandle,
    family: Literal["ipv4", "ipv6"],
    hook: str,
    priority: int,
    defragment: bool,
) -> Link:
    """Make a netfilter link; see `Program.attach_netfilter`."""
    where = f"netfilter's {family} {hook}"
    expect_type(program, where, "netfilter")
    hook_number = one_of(NETFILTER_HOOKS, hook, "netfilter hook")
    family_number = one_of(_FAMILIES, family, "family of netfilter's")
    if not _RESERVED[0] < priority < _RESERVED[1]:
        raise BpfError(
            f"{priority} is no priority",
            why="the first and last of 32 bits are the kernel's own",
            remedy="choose one between them, such as 0",
        )
    flags = _DEFRAGMENT if defragment else 0
    result = create(
        program,
        0,
        AttachType.NETFILTER,
        0,
        "IIiI",
        family_number,
        hook_number,
        priority,
        flags,
    )
    if result in (-errnos.EBUSY, -errnos.EEXIST):
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=-result,
            why=f"priority {priority} is taken there; nothing was changed",
            remedy="choose another priority",
        )
    if result == -errnos.EAFNOSUPPORT:
        raise FeatureMissing(
            f"netfilter for {family}", errno=-result, why="it was built without, or has no such module"
        )
    return Link(made(result, program, where, capability="CAP_NET_ADMIN CAP_BPF"))
