"""Programs: the ways onto a hook, trial runs, life."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from hookline.bpf._programs._trial import TestRun, TrialRuns

if TYPE_CHECKING:
    from hookline.bpf._links._attach_socket import MapAttachment, SocketAttachment
    from hookline.bpf._links._attach_tc import Place
    from hookline.bpf._links._clsact import ClsactFilter
    from hookline.bpf._links._group import LinkGroup
    from hookline.bpf._links._iterator import CgroupOrder, Iterator
    from hookline.bpf._links._link import Link
    from hookline.bpf._maps._map import Map

__all__ = ["Program", "TestRun"]


class Program(TrialRuns):
    """A program of an object, or one that is loaded already.

    A program from an object lives until the object is closed; `duplicate` makes a handle that lives on, and
    what is attached stays attached by its link. Programs from `from_pin` and `from_id` are the caller's.

    What ``attach…`` returns detaches in its ``with`` block's end unless it is pinned meanwhile. All of them raise
    `NotPermitted` where a capability is missing, `FeatureMissing` where the kernel has no such hook, and
    `BpfError` where there is no such target, where the program is of another type, or where the kernel refuses.

    Attributes:
        name: The C function's name; for an adopted one without types the kernel's 15 characters.
        section: The section it was compiled into, ``""`` for an adopted one.
        type: The kernel's name of its type: ``"xdp"``, ``"sched_cls"``, …
        expected_attach_type: The ``BPF_*`` number of `AttachType` that it was loaded for, None for an adopted
            one: the kernel does not tell.
    """

    def attach(self, target: str = "") -> Link | ClsactFilter | LinkGroup:
        """Attach where a text says, or where the program's section says.

        Args:
            target: ``KIND[:WHERE]``, such as ``"xdp:eth0"``, ``"kprobe:tcp_connect"``,
                ``"cgroup:/sys/fs/cgroup/app:connect4"``; `bpf.TARGETS` has them all. Left out, the section decides:
                ``SEC("tracepoint/sched/sched_switch")``, ``SEC("uprobe//usr/bin/app:main")``.

        Raises:
            BpfError: The text is none of these forms, or not for a program of this type; the error lists those
                that are.
        """
        from hookline.bpf._links import _targets

        return _targets.attach(self, target)

    # Interfaces

    def attach_xdp(
        self, interface: str | int, mode: Literal["auto", "native", "generic", "offload"] = "auto"
    ) -> Link:
        """Attach to an interface's XDP hook.

        Args:
            interface: A name or an index in this thread's network namespace.
            mode: ``"native"`` in the driver, ``"generic"`` after the packet has become a socket buffer,
                ``"offload"`` in the device, ``"auto"`` native where the driver can, else generic; `Link.mode`
                says which.

        Raises:
            BpfError: There is no such interface, or it has an XDP program (named; nothing is changed).
            NotPermitted: CAP_NET_ADMIN or CAP_BPF is missing.
        """
        from hookline.bpf._links import _attach_xdp

        return _attach_xdp.attach_xdp(self, interface, mode)

    def attach_tc(
        self,
        interface: str | int,
        direction: Literal["ingress", "egress"],
        *,
        hook: Literal["auto", "tcx", "clsact"] = "auto",
        before: Place = None,
        after: Place = None,
        expected_revision: int = 0,
        priority: int = 50,
        pin: str | os.PathLike[str] | None = None,
    ) -> Link | ClsactFilter:
        """Attach to an interface's traffic control hook.

        Args:
            interface: A name or an index in this thread's network namespace.
            direction: ``"ingress"`` or ``"egress"``, as the interface sees it.
            hook: ``"tcx"`` (Linux 6.6), ``"clsact"``, or ``"auto"``: tcx where the kernel has it.
            before: tcx only: run before this link or program, or before all.
            after: tcx only: run after this one, or after all (which is the default).
            expected_revision: tcx only: fail if the hook's programs changed since this revision (0: never);
                `bpf.query` tells it.
            priority: clsact only: the filter's preference; lower runs first.
            pin: Where to pin it at once: a process that is killed leaves no clsact filter without its pin.

        Returns:
            A `Link`, or for clsact a filter with the same ways to detach, close and pin; ``hook`` says which.

        Raises:
            FeatureMissing: ``hook="tcx"`` or an order was asked for and the kernel has no tcx.
            LinkChanged: The revision is not the expected one.
            BpfError: There is no such interface, or the kernel refuses.
        """
        from hookline.bpf._links import _attach_tc

        return _attach_tc.attach_tc(
            self,
            interface,
            direction,
            hook=hook,
            before=before,
            after=after,
            expected_revision=expected_revision,
            priority=priority,
            pin=pin,
        )

    def attach_netkit(
        self,
        interface: str | int,
        end: Literal["primary", "peer"],
        *,
        before: Place = None,
        after: Place = None,
        expected_revision: int = 0,
    ) -> Link:
        """Attach to what one end of a netkit pair sends (Linux 6.7); compiled as ``SEC("netkit/primary")``.

        Args:
            interface: The pair's primary device, in this thread's network namespace; it manages both ends.
            end: Whose packets.
            before: Run before this link or program, or before all.
            after: Run after this one, or after all.
            expected_revision: Fail if the hook's programs changed since this revision (0: never).
        """
        from hookline.bpf._links import _attach_tc

        return _attach_tc.attach_netkit(
            self, interface, end, before=before, after=after, expected_revision=expected_revision
        )

    def attach_netfilter(
        self,
        family: Literal["ipv4", "ipv6"],
        hook: Literal["prerouting", "input", "forward", "output", "postrouting"],
        priority: int = 0,
        *,
        defragment: bool = False,
    ) -> Link:
        """Attach to a netfilter hook of this thread's network namespace (Linux 6.4); ``SEC("netfilter")``.

        Args:
            family: Whose packets.
            hook: Where in the stack.
            priority: The place among all users of the hook, iptables and nftables too; lower runs first. One
                priority holds one program.
            defragment: Let the kernel put fragments together first (Linux 6.6).
        """
        from hookline.bpf._links import _attach_netfilter

        return _attach_netfilter.attach_netfilter(self, family, hook, priority, defragment)

    # Cgroups, network namespaces, sockets

    def attach_cgroup(self, path: str | os.PathLike[str], attach_type: int | str | None = None) -> Link:
        """Attach to a cgroup: its processes and those of the cgroups below it.

        Args:
            path: A folder of cgroup v2; a relative path begins where that is mounted (``"app"``).
            attach_type: The hook, as an `AttachType` or a name such as ``"connect4"``. An object's program
                knows its own.
        """
        from hookline.bpf._arguments import one_of
        from hookline.bpf._links import _attach_cgroup

        if isinstance(attach_type, str):
            attach_type = one_of(_attach_cgroup.CGROUP_HOOKS, attach_type, "hook of a cgroup")
        return _attach_cgroup.attach_cgroup(self, path, attach_type)

    def attach_netns(self, namespace: str | os.PathLike[str] | int | None = None) -> Link:
        """Attach a ``sk_lookup`` or ``flow_dissector`` program to a network namespace.

        Args:
            namespace: A path, a name of ``ip netns``, a descriptor, or None for this thread's.
        """
        from hookline.bpf._links import _attach_cgroup

        return _attach_cgroup.attach_netns(self, namespace)

    def attach_sockmap(
        self, target: Map, kind: Literal["verdict", "stream_verdict", "stream_parser"] | None = None
    ) -> Link | MapAttachment:
        """Attach a ``sk_msg`` or ``sk_skb`` program to the sockets of a sockmap or sockhash.

        A socket takes the programs along that its map has when it is put in; what is attached, updated or detached
        later is for sockets that come later. Reading ``FIONREAD`` of such a socket is wrong on some kernels unless a
        ``sk_skb`` verdict program, which may do nothing, is attached too.

        Args:
            target: The map.
            kind: Of ``sk_skb`` programs: what it does; by default what its section says, else ``"verdict"``.

        Returns:
            A `Link` (Linux 6.10), or an attachment with a link's manners that cannot be pinned.
        """
        from hookline.bpf._links import _attach_socket

        return _attach_socket.attach_sockmap(self, target, kind)

    def attach_socket(self, target: socket.socket | int) -> SocketAttachment:
        """Attach a socket filter to a socket of this process, or a ``sk_reuseport`` program to a group of them.

        The socket holds the program: it goes with the socket, or by closing what is returned.

        Args:
            target: A socket, or its descriptor.
        """
        from hookline.bpf._links import _attach_socket

        return _attach_socket.attach_socket(self, target)

    def attach_socket_of(self, pid: int, fd: int) -> SocketAttachment:
        """As `attach_socket`, for another process's socket (CAP_SYS_PTRACE; it is not stopped).

        Args:
            pid: The process.
            fd: Its descriptor's number, as ``/proc/PID/fd`` shows.
        """
        from hookline.bpf._links import _attach_socket

        return _attach_socket.attach_socket_of(self, pid, fd)

    # The kernel's own code

    def attach_tracepoint(self, name: str, *, cookie: int = 0) -> Link:
        """Attach to a tracepoint, such as ``"sched/sched_switch"``; needs tracefs (`bpf.ensure_tracefs`).

        Args:
            name: ``GROUP/NAME``.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_tracepoint(self, name, cookie)

    def attach_raw_tracepoint(self, name: str) -> Link:
        """Attach to a raw tracepoint, such as ``"xdp_exception"``.

        Raises:
            BpfError: There is none of that name, or the kernel refuses.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_raw_tracepoint(self, name)

    def attach_kprobe(
        self, function: str, *, offset: int = 0, returns: bool = False, cookie: int = 0
    ) -> Link:
        """Attach to a function of the kernel.

        Args:
            function: Its name in ``/proc/kallsyms``; of a system call `bpf.system_call` tells it.
            offset: Of the instruction, in bytes from the function's start.
            returns: Run when it returns rather than when it begins.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_kprobe(self, function, offset=offset, returns=returns, cookie=cookie)

    def attach_kprobe_multi(
        self, functions: str | Sequence[str], *, returns: bool = False, cookie: int = 0
    ) -> Link:
        """Attach to many functions of the kernel by one link; compiled as ``SEC("kprobe.multi")``.

        Args:
            functions: Names, or a shell pattern such as ``"tcp_*"`` (which needs tracefs).
            returns: Run when they return rather than when they begin.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_kprobe_multi(self, functions, returns=returns, cookie=cookie)

    def attach_tracing(self) -> Link:
        """Attach a ``tp_btf``, ``fentry``, ``fexit``, ``fmod_ret``, ``freplace`` or ``lsm`` program.

        Where was decided before the load, by its section or by `Object.set_attach_target`.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_tracing(self)

    def attach_iterator(
        self,
        *,
        map: Map | None = None,
        process: int | None = None,
        thread: int | None = None,
        cgroup: str | os.PathLike[str] | None = None,
        order: CgroupOrder = "descendants",
    ) -> Iterator:
        """Make an iterator of a ``SEC("iter/…")`` program; its `Iterator.read` walks all objects.

        Args:
            map: Whose entries (``bpf_map_elem``, ``bpf_sk_storage_map``).
            process: Only this process's threads (the ``task`` iterators).
            thread: Only this thread.
            cgroup: Where to begin (the ``cgroup`` iterator).
            order: In which order from there.
        """
        from hookline.bpf._links import _iterator

        return _iterator.attach_iterator(
            self, map=map, process=process, thread=thread, cgroup=cgroup, order=order
        )

    def attach_perf_event(
        self,
        event: str = "cpu-clock",
        *,
        frequency_hz: int = 0,
        period: int = 0,
        pid: int | None = None,
        cpus: Sequence[int] | None = None,
        cookie: int = 0,
    ) -> LinkGroup:
        """Run by a software event on each CPU: a clock, page faults, context switches, …

        Args:
            event: ``"cpu-clock"``, ``"page-faults"``, … (``perf list sw``).
            frequency_hz: How often per second of the event's time; 100 by default for clocks.
            period: Or: each time so many of them have happened; for clocks nanoseconds. 1 by default for others.
            pid: Only in this process.
            cpus: Only on these CPUs.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_trace

        return _attach_trace.attach_perf_event(
            self, event, frequency_hz=frequency_hz, period=period, pid=pid, cpus=cpus, cookie=cookie
        )

    # Programs and libraries

    def attach_uprobe(
        self,
        path: str | os.PathLike[str],
        function: str | int,
        *,
        offset: int = 0,
        pid: int | None = None,
        returns: bool = False,
        cookie: int = 0,
    ) -> Link:
        """Attach to a function of a program or shared library, in every process that runs it.

        A hit costs about 1 µs on bare metal, 10 µs in some virtual machines.

        Args:
            path: The file; a bare name is looked for in PATH and where libraries are (``"libc.so.6"``).
            function: Its name, or an offset in the file.
            offset: Of the instruction, in bytes from the function's start.
            pid: Only in this process.
            returns: Run when it returns rather than when it begins. Refused for Go programs, which it would
                crash.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_user

        return _attach_user.attach_uprobe(
            self, path, function, offset=offset, pid=pid, returns=returns, cookie=cookie
        )

    def attach_uprobe_multi(
        self,
        path: str | os.PathLike[str],
        functions: str | Sequence[str | int],
        *,
        pid: int | None = None,
        returns: bool = False,
        cookie: int = 0,
    ) -> Link:
        """Attach to many functions of a file by one link (Linux 6.6); compiled as ``SEC("uprobe.multi")``.

        Args:
            path: As for `attach_uprobe`.
            functions: Names or offsets, or a shell pattern such as ``"SSL_*"``.
            pid: Only in this process.
            returns: Run when they return rather than when they begin.
            cookie: A number that ``bpf_get_attach_cookie()`` tells the program.
        """
        from hookline.bpf._links import _attach_user

        return _attach_user.attach_uprobe_multi(
            self, path, functions, pid=pid, returns=returns, cookie=cookie
        )
