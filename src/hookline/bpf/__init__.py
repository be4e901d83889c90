"""The kernel's eBPF interface: objects, programs, maps, links, pins; it knows no networking.

    with bpf.Object.open("count.bpf.o") as obj:
        obj.constants["port"] = 443
        obj.load()
        with obj.programs["count"].attach_xdp("eth0"):
            time.sleep(10)
            print(obj.maps["packets"].read())

Types come from BTF: keys and values are NumPy's, with the layout that the C compiler chose. Namespaces are
the caller's: attach calls act in the calling thread's network namespace. Errors are all `BpfError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookline.bpf import pin
from hookline.bpf._errors import (
    BpfError,
    FeatureMissing,
    LinkChanged,
    MapFull,
    NotPermitted,
    ObjectError,
    TargetError,
    VerifierError,
    lacking,
)
from hookline.bpf._links._link import Link
from hookline.bpf._maps._map import Map, MapDefinition
from hookline.bpf._objects._object import Constants, Object
from hookline.bpf._programs._info import ProgramInfo
from hookline.bpf._programs._program import Program, TestRun
from hookline.bpf._syscall import AttachType, possible_cpus
from hookline.bpf._types._btf import Btf
from hookline.bpf.pin import ensure_bpffs, ensure_tracefs

if TYPE_CHECKING:
    from hookline.bpf import features
    from hookline.bpf._introspection._code import (
        Function,
        Jited,
        MachineFunction,
        MachineInstruction,
        SourceLine,
        Xlated,
    )
    from hookline.bpf._introspection._disassemble import Instruction, disassemble
    from hookline.bpf._introspection._holders import Holder, holders, pinned
    from hookline.bpf._introspection._placements import Placement, placements
    from hookline.bpf._introspection._system import btfs, links, maps, programs, run_statistics
    from hookline.bpf._introspection._trace_pipe import TraceLine, TracePipe, trace_pipe
    from hookline.bpf._links._attach_cgroup import cgroup_folder
    from hookline.bpf._links._attach_socket import MapAttachment, SocketAttachment
    from hookline.bpf._links._attach_trace import system_call
    from hookline.bpf._links._attach_xdp import refuse_occupied
    from hookline.bpf._links._clsact import ClsactFilter
    from hookline.bpf._links._group import LinkGroup
    from hookline.bpf._links._iterator import Iterator
    from hookline.bpf._links._link_info import LinkInfo
    from hookline.bpf._links._query import Hook, HookEntry, query
    from hookline.bpf._links._targets import TARGETS, target_forms, target_types
    from hookline.bpf._maps._ring import Backlog, Ring
    from hookline.bpf._maps._user_ring import UserRing
    from hookline.bpf._objects._source import SourcePlace
    from hookline.bpf._objects._verify import Verdict, verify
    from hookline.bpf._types._kernel_types import BtfInfo

__all__ = [
    "TARGETS",
    "AttachType",
    "Backlog",
    "BpfError",
    "Btf",
    "BtfInfo",
    "ClsactFilter",
    "Constants",
    "FeatureMissing",
    "Function",
    "Holder",
    "Hook",
    "HookEntry",
    "Instruction",
    "Iterator",
    "Jited",
    "Link",
    "LinkChanged",
    "LinkGroup",
    "LinkInfo",
    "MachineFunction",
    "MachineInstruction",
    "Map",
    "MapAttachment",
    "MapDefinition",
    "MapFull",
    "NotPermitted",
    "Object",
    "ObjectError",
    "Placement",
    "Program",
    "ProgramInfo",
    "Ring",
    "SocketAttachment",
    "SourceLine",
    "SourcePlace",
    "TargetError",
    "TestRun",
    "TraceLine",
    "TracePipe",
    "UserRing",
    "Verdict",
    "VerifierError",
    "Xlated",
    "btfs",
    "cgroup_folder",
    "disassemble",
    "ensure_bpffs",
    "ensure_tracefs",
    "features",
    "holders",
    "lacking",
    "links",
    "maps",
    "pin",
    "pinned",
    "placements",
    "possible_cpus",
    "programs",
    "query",
    "refuse_occupied",
    "run_statistics",
    "system_call",
    "target_forms",
    "target_types",
    "trace_pipe",
    "verify",
]

# What not everybody needs is imported when it is first named.
_LATER = {
    "BtfInfo": "_types._kernel_types",
    "UserRing": "_maps._user_ring",
    "Backlog": "_maps._ring",
    "Ring": "_maps._ring",
    "LinkInfo": "_links._link_info",
    "ClsactFilter": "_links._clsact",
    "btfs": "_introspection._system",
    "links": "_introspection._system",
    "maps": "_introspection._system",
    "programs": "_introspection._system",
    "run_statistics": "_introspection._system",
    "cgroup_folder": "_links._attach_cgroup",
    "MapAttachment": "_links._attach_socket",
    "SocketAttachment": "_links._attach_socket",
    "system_call": "_links._attach_trace",
    "refuse_occupied": "_links._attach_xdp",
    "LinkGroup": "_links._group",
    "Iterator": "_links._iterator",
    "Hook": "_links._query",
    "HookEntry": "_links._query",
    "query": "_links._query",
    "TARGETS": "_links._targets",
    "target_forms": "_links._targets",
    "target_types": "_links._targets",
    "Placement": "_introspection._placements",
    "placements": "_introspection._placements",
    "Function": "_introspection._code",
    "Jited": "_introspection._code",
    "MachineFunction": "_introspection._code",
    "MachineInstruction": "_introspection._code",
    "SourceLine": "_introspection._code",
    "Xlated": "_introspection._code",
    "Instruction": "_introspection._disassemble",
    "disassemble": "_introspection._disassemble",
    "Holder": "_introspection._holders",
    "holders": "_introspection._holders",
    "pinned": "_introspection._holders",
    "TraceLine": "_introspection._trace_pipe",
    "TracePipe": "_introspection._trace_pipe",
    "trace_pipe": "_introspection._trace_pipe",
    "SourcePlace": "_objects._source",
    "Verdict": "_objects._verify",
    "verify": "_objects._verify",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "features":
        return import_module(f"{__name__}.features")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
