"""Why a load failed: libbpf's words and the verifier's log, turned into an error that says what to do."""

from __future__ import annotations

import difflib
import errno as errnos
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hookline.bpf import _rights
from hookline.bpf._errors import (
    END_CHARACTERS,
    BpfError,
    FeatureMissing,
    NotPermitted,
    ObjectError,
    VerifierError,
)
from hookline.bpf._maps._map import MapDefinition
from hookline.bpf._objects import _libbpf
from hookline.bpf._objects._source import SourceMap, SourcePlace

__all__ = ["SECTIONS", "Failure", "explain"]

# The beginnings of section names that make a program's type; what follows a slash is the hook's own.
SECTIONS = [
    "xdp", "xdp.frags", "tc", "tcx/ingress", "tcx/egress", "netkit/primary", "netkit/peer", "classifier", "action",
    "socket", "sk_reuseport", "kprobe", "kretprobe", "kprobe.multi", "kretprobe.multi", "uprobe", "uretprobe",
    "uprobe.multi", "uretprobe.multi", "uprobe.s", "uretprobe.s", "ksyscall", "kretsyscall", "usdt", "tp",
    "tracepoint", "raw_tp", "raw_tracepoint", "raw_tp.w", "raw_tracepoint.w", "tp_btf", "fentry", "fexit",
    "fmod_ret", "fentry.s", "fexit.s", "fmod_ret.s", "freplace", "lsm", "lsm.s", "lsm_cgroup", "iter", "iter.s",
    "syscall", "xdp/devmap", "xdp/cpumap", "xdp_devmap", "xdp_cpumap", "lwt_in", "lwt_out", "lwt_xmit",
    "lwt_seg6local", "sockops", "sk_skb", "sk_skb/stream_parser", "sk_skb/stream_verdict", "sk_skb/verdict",
    "sk_msg", "lirc_mode2", "flow_dissector", "perf_event", "netfilter", "struct_ops", "sk_lookup",
    "cgroup_skb/ingress", "cgroup_skb/egress", "cgroup/skb", "cgroup/sock", "cgroup/sock_create",
    "cgroup/sock_release", "cgroup/post_bind4", "cgroup/post_bind6", "cgroup/bind4", "cgroup/bind6",
    "cgroup/connect4", "cgroup/connect6", "cgroup/connect_unix", "cgroup/sendmsg4", "cgroup/sendmsg6",
    "cgroup/recvmsg4", "cgroup/recvmsg6", "cgroup/getpeername4", "cgroup/getpeername6", "cgroup/getsockname4",
    "cgroup/getsockname6", "cgroup/sysctl", "cgroup/getsockopt", "cgroup/setsockopt", "cgroup/dev",
]  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """What is known of a load that failed.

    Attributes:
        name: The object's.
        errno: The kernel's or libbpf's answer.
        said: libbpf's messages.
        log: The verifier's.
        data: The object file.
        types: Its programs' types.
        maps: What its maps are to be.
    """

    name: str
    errno: int
    said: list[str]
    log: str
    data: bytes
    types: frozenset[str]
    maps: Mapping[str, MapDefinition]

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    @property
    def end(self) -> str:
        """The log's last lines, where its reason stands: the whole may have a million."""
        return self.log[-END_CHARACTERS:]

    def find(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.text)


def explain(failure: Failure) -> BpfError:
    """The error for a load that failed."""
    refused = refused_program(failure.said)
    if refused:
        return _program_refused(failure, refused)
    for explanation in (_unknown_section, _unresolved, _no_target, _map_refused, _struct_ops):
        error = explanation(failure)
        if error is not None:
            return error
    if failure.errno == errnos.EPERM:
        return NotPermitted(
            f"cannot load {failure.name}", capability=" ".join(_rights.for_programs(failure.types))
        )
    if failure.find("kernel BTF is missing|Error loading vmlinux BTF"):
        return FeatureMissing(
            "BTF of its own (CONFIG_DEBUG_INFO_BTF)",
            minimum_kernel="5.2",
            errno=failure.errno,
            remedy="run a kernel with CONFIG_DEBUG_INFO_BTF=y",
        )
    return ObjectError(
        f"cannot load {failure.name}",
        errno=failure.errno,
        why=_words(failure),
        remedy="hookline verify says it of each program alone; hookline doctor shows what this kernel has",
    )


def refused_program(said: list[str]) -> str:
    """The program at which a load ended, by libbpf's messages; ``""`` where it was none."""
    found = re.search(r"prog '([^']+)': BPF program load failed", "\n".join(said))
    return found[1] if found else ""


# Answers that say nothing of what was to be loaded.
_CIRCUMSTANCES = {
    errnos.EMFILE: (
        "this process has as many descriptors open as it may",
        "close some or raise the limit: ulimit -n; an object takes two for each program and map while it is loaded",
    ),
    errnos.ENFILE: ("the machine has as many files open as it may", "see /proc/sys/fs/file-max"),
    errnos.ENOMEM: ("the kernel has no memory for it", ""),
    errnos.EAGAIN: ("the verifier was interrupted", "load it again"),
    errnos.EINTR: ("it was interrupted", "load it again"),
}


def circumstance(what: str, errno: int) -> BpfError:
    """The error where neither the object nor the kernel's abilities are the reason."""
    why, remedy = _CIRCUMSTANCES.get(errno, ("", ""))
    return BpfError(what, errno=errno, why=why, remedy=remedy)


def _program_refused(failure: Failure, program: str) -> BpfError:
    if failure.errno in _CIRCUMSTANCES:
        return circumstance(f"cannot load program {program!r} of {failure.name}", failure.errno)
    verified = re.search(r"^processed \d+ insns", failure.end, re.MULTILINE)
    if failure.errno == errnos.EPERM and not verified:
        return NotPermitted(
            f"cannot load program {program!r} of {failure.name}",
            capability=" ".join(_rights.for_programs(failure.types)),
        )
    relocation = re.search(
        r"failed to resolve CO-RE relocation <(\w+)> \[\d+\] (?:(struct|union|enum) )?([^\s(]+)", failure.end
    )
    if relocation:
        return _relocation_failed(failure, program, relocation)
    helper = re.search(r"invalid func unknown#(\d+)", failure.end)
    if helper:
        return _helper_missing(int(helper[1]), failure.errno)
    if failure.log.strip():
        return VerifierError(program, failure.log, errno=failure.errno, lines=SourceMap(failure.data))
    why = f"it refused the program without a reason: {_words(failure)}"
    if failure.errno == errnos.EINVAL:
        return FeatureMissing(f"program type of {program!r}", errno=failure.errno, why=why)
    return ObjectError(
        f"cannot load program {program!r} of {failure.name}",
        errno=failure.errno,
        why=why,
        remedy="hookline doctor shows what this kernel has; leave the program out: --program, Object.only()",
    )


def _relocation_failed(failure: Failure, program: str, found: re.Match[str]) -> BpfError:
    kind, keyword, path = found.groups()
    owner, _, member = path.partition(".")
    thing = f"{keyword or 'type'} {owner.partition('___')[0]}"
    known = not member or _has_type(owner.partition("___")[0])
    lacking = f"{thing} has no member {member}" if member and known else f"there is no {thing}"
    if kind.startswith("enumval"):
        owner, _, member = path.partition("::")
        lacking = f"enum {owner.partition('___')[0]} has no {member}"
    place = _place_of_log(failure, program)
    return ObjectError(
        f"program {program!r} of {failure.name} does not fit this kernel" + (f" ({place})" if place else ""),
        errno=failure.errno,
        why=f"in Linux {os.uname().release}, {lacking}",
        remedy="ask before it is used: bpf_core_field_exists(), bpf_core_type_exists(), bpf_core_enum_value_exists()",
    )


def _has_type(name: str) -> bool:
    """Whether the kernel has a type of this name; yes where that cannot be told."""
    from hookline.bpf._types._btf import Btf

    try:
        return Btf.vmlinux().find(name) is not None
    except BpfError:
        return True


def _place_of_log(failure: Failure, program: str) -> SourcePlace | None:
    found = re.search(r"^(\d+): <invalid CO-RE relocation>", failure.end, re.MULTILINE)
    return SourceMap(failure.data).find(program, int(found[1])) if found else None


def _helper_missing(number: int, errno: int) -> BpfError:
    from hookline.bpf.features import _helpers

    name = _helpers.name_of(number)
    return FeatureMissing(
        name if name.startswith("helper") else f"helper {name} (number {number})",
        minimum_kernel=_helpers.minimum_kernel(number),
        errno=errno,
        remedy="run a newer kernel, or leave the program out: Object.leave_out()",
    )


def _unknown_section(failure: Failure) -> BpfError | None:
    found = failure.find(r"prog '([^']+)': missing BPF prog type, check ELF section name '([^']+)'")
    if not found:
        return None
    program, section = found.groups()
    begin, slash, rest = section.partition("/")
    near = difflib.get_close_matches(section, SECTIONS, 1) or difflib.get_close_matches(begin, SECTIONS, 1)
    if near:
        complete = near[0] + slash + rest if slash and "/" not in near[0] else near[0]
        remedy = f'did you mean SEC("{complete}")?'
    else:
        remedy = (
            'a section names the hook: SEC("xdp"), SEC("tc"), SEC("kprobe/FUNCTION"), SEC("tp_btf/NAME") …'
        )
    return ObjectError(
        f"program {program!r} of {failure.name} has no type",
        errno=failure.errno,
        why=f"its section {section!r} is none that makes one",
        remedy=remedy,
    )


def _unresolved(failure: Failure) -> BpfError | None:
    found = failure.find(r"extern \((?:func )?ksym\) '([^']+)': (?:not found|func_proto|.*incompatible)")
    if found:
        if "incompatible" in found[0] or "func_proto" in found[0]:
            return ObjectError(
                f"{failure.name} calls {found[1]}() with other arguments than the kernel's",
                errno=failure.errno,
                why=_words(failure),
                remedy="declare it as this kernel's BTF does: bpftool btf dump file /sys/kernel/btf/vmlinux format c",
            )
        return FeatureMissing(
            f"function {found[1]}() for programs (a kfunc)",
            errno=failure.errno,
            why=f"the types of Linux {os.uname().release} and its modules do not have it",
            remedy="declare it __weak and test bpf_ksym_exists() before the call, or run a kernel that has it",
        )
    if failure.find("failed to open system Kconfig"):
        return ObjectError(
            f"{failure.name} asks for the kernel's configuration",
            errno=failure.errno,
            why=f"Linux {os.uname().release} shows it neither in /proc/config.gz nor in /boot",
            remedy="declare the options __weak, or ask for what they bring instead (bpf_core_type_exists())",
        )
    found = failure.find(r"extern '([^']+)' \(strong\): not resolved")
    if found:
        remedy = (
            "declare it __weak: it is 0 then where the kernel does not set the option"
            if found[1].startswith("CONFIG_")
            else "declare it __weak and test it"
        )
        return ObjectError(
            f"{failure.name} needs {found[1]}",
            errno=failure.errno,
            why=f"Linux {os.uname().release} does not have it, or does not show its configuration",
            remedy=remedy,
        )
    return None


def unresolved_at_open(name: str, said: list[str]) -> BpfError | None:
    """The error where libbpf did not open an object for a function or variable that is nowhere, or None."""
    found = re.search(r"failed to find BTF for extern '([^']+)'", "\n".join(said))
    if not found:
        return None
    return ObjectError(
        f"{name} uses {found[1]}, which it does not have",
        why="it is declared extern, and is neither in the object nor marked as the kernel's",
        remedy="link the object that has it (bpftool gen object), or mark it __ksym or __kconfig",
    )


def _no_target(failure: Failure) -> BpfError | None:
    found = failure.find(r"prog '([^']+)': failed to find kernel BTF type ID of '([^']+)': -(\d+)")
    if not found:
        return None
    return ObjectError(
        f"program {found[1]!r} of {failure.name} has nothing to attach to",
        errno=failure.errno,
        why=f"the types of Linux {os.uname().release} have no {found[2]}",
        remedy="the function may be inlined or named otherwise here: bpftool btf dump file /sys/kernel/btf/vmlinux | grep NAME",
    )


def _map_refused(failure: Failure) -> BpfError | None:
    found = failure.find(r"map '([^']+)': failed to create: [^(]*\(-(\d+)\)")
    if not found:
        return None
    name, errno = found[1], int(found[2])
    what = f"cannot make map {name!r} of {failure.name}"
    if errno == errnos.EPERM:
        kinds = {failure.maps[name].type} if name in failure.maps else set()
        return NotPermitted(what, capability=" ".join(_rights.for_maps(kinds)), errno=errno)
    if errno in (errnos.ENOMEM, errnos.E2BIG):
        remedy = f"make it smaller: obj.resize({name!r}, …) before load"
        return ObjectError(what, errno=errno, why="there is not enough memory for its size", remedy=remedy)
    if errno == errnos.EINVAL:
        return _map_invalid(what, failure.maps.get(name))
    return ObjectError(
        what,
        errno=errno,
        remedy="check its type, sizes and flags; hookline doctor shows what this kernel has",
    )


def _map_invalid(what: str, wanted: MapDefinition | None) -> BpfError:
    from hookline.bpf import features

    errno = errnos.EINVAL
    if wanted is not None and wanted.type not in features.map_types():
        return FeatureMissing(
            f"map {wanted.type}", errno=errno, remedy="check its type, or run a newer kernel"
        )
    if wanted is not None and not features.map_type(wanted.type):
        return features.map_type(wanted.type).error()
    if wanted is not None and not wanted.max_entries:
        remedy = "give it a size: __uint(max_entries, 1024), or obj.resize() before load"
        return ObjectError(what, errno=errno, why="it has no max_entries", remedy=remedy)
    why = "the kernel refuses its sizes or its flags"
    remedy = "check key and value sizes, max_entries and map_flags against what its type takes"
    return ObjectError(what, errno=errno, why=why, remedy=remedy)


def _struct_ops(failure: Failure) -> BpfError | None:
    found = failure.find(r"struct_ops init_kern: struct (\w+) is not found in kernel BTF")
    if not found:
        return None
    return FeatureMissing(
        f"struct_ops {found[1]}",
        errno=failure.errno,
        why=f"the types of Linux {os.uname().release} do not have it",
        remedy="run a kernel that has it",
    )


def _words(failure: Failure) -> str:
    """libbpf's messages without those that only repeat the failure."""
    told = [line for line in failure.said if not re.search("failed to load object|failed to load: -", line)]
    return "; ".join(told) or _libbpf.error_text(failure.errno)
