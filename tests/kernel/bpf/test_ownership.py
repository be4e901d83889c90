"""Handles own what they close: none is copied, and a forked child takes nothing off its parent's hooks."""

from __future__ import annotations

import copy
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import Wire, descriptors
from tests.kernel.bpf.hooks import Open, supported
from tests.kernel.bpf.test_hooks_net import datagrams


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked child; its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leave(block: AbstractContextManager[object]) -> Callable[[], None]:
    def left() -> None:
        before = descriptors()
        with block:
            pass
        # A filter on an interface has no descriptor.
        assert descriptors() <= before
        if isinstance(block, bpf.Link):
            assert descriptors() == before - 1

    return left


@pytest.mark.parametrize("hook", ["xdp", "tcx", "clsact"])
def test_a_forked_child_leaves_its_parent_s_hook(hooked: Open, wire: Wire, hook: str) -> None:
    if hook == "tcx":
        supported("tcx")
    program = hooked("xdp" if hook == "xdp" else "tc")
    target = "xdp:near" if hook == "xdp" else f"{hook}:near:ingress"
    with program.program.attach(target) as link:
        assert in_child(leave(link)) == 0
        with program.more(3):
            wire.send(3)
        # The child forgets it, which is nobody's fault there; warnings are errors.
        assert not isinstance(link, bpf.LinkGroup)
        assert in_child(link.__del__) == 0
        with program.more(3):
            wire.send(3)
        # Said in so many words, it is done.
        assert in_child(link.detach) == 0
        with program.more(0):
            wire.send(3)


def test_a_forked_child_leaves_its_parent_s_socket(hooked: Open) -> None:
    hook = hooked("socket_filter")
    with datagrams() as (one, other), hook.program.attach_socket(one) as attachment:
        assert in_child(leave(attachment)) == 0
        with hook.more(1):
            other.sendto(b"x", one.getsockname())
        assert in_child(attachment.detach) == 0
        with hook.more(0):
            other.sendto(b"x", one.getsockname())


def test_what_is_open_is_not_copied(hooked: Open, wire: Wire, loaded: bpf.Object) -> None:
    with (
        loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact") as clsact,
        loaded.programs["xdp_pass"].attach_xdp("near") as link,
        bpf.Ring(loaded.maps["ring"], "u8") as ring,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end,
        hooked("socket_filter").program.attach_socket(end) as attachment,
    ):
        group = bpf.LinkGroup([link])
        before = descriptors()
        handles: tuple[Any, ...] = (clsact, link, group, ring, attachment, loaded)
        for handle in (*handles, loaded.maps["ring"], loaded.programs["xdp_pass"]):
            named = r"duplicate\(\)" if hasattr(handle, "duplicate") else "open another"
            for way in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(bpf.BpfError, match=rf"cannot be copied.*{named}"):
                    way(handle)
        assert descriptors() == before
        assert not ring.wait(0)
        with loaded.maps["ring"].duplicate() as again:
            assert again.id == loaded.maps["ring"].id


def test_all_that_is_closed_is_an_owner() -> None:
    from hookline.bpf._owner import Owner

    closed = {name for name in bpf.__all__ if hasattr(getattr(bpf, name), "close")}
    assert {"Map", "Program", "Link", "Ring", "UserRing", "Object", "ClsactFilter", "LinkGroup"} <= closed
    assert [name for name in sorted(closed) if not issubclass(getattr(bpf, name), Owner)] == []
