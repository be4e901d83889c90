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
from hookline.bpf._btf import Btf
from hookline.bpf._clsact import ClsactFilter
from hookline.bpf._errors import (
    BpfError,
    FeatureMissing,
    LinkChanged,
    MapFull,
    NotPermitted,
    ObjectError,
    VerifierError,
    lacking,
)
from hookline.bpf._info import ProgramInfo
from hookline.bpf._link import Link
from hookline.bpf._link_info import LinkInfo
from hookline.bpf._map import Map, MapDefinition
from hookline.bpf._object import Constants, Object
from hookline.bpf._program import Program, TestRun
from hookline.bpf._ring import Backlog, Ring
from hookline.bpf._syscall import AttachType, possible_cpus
from hookline.bpf._system import btfs, links, maps, programs, run_statistics
from hookline.bpf._types import BtfInfo
from hookline.bpf._user_ring import UserRing
from hookline.bpf.pin import ensure_bpffs, ensure_tracefs

if TYPE_CHECKING:
    from hookline.bpf import features
    from hookline.bpf._attach_cgroup import cgroup_folder
    from hookline.bpf._attach_socket import MapAttachment, SocketAttachment
    from hookline.bpf._attach_trace import system_call
    from hookline.bpf._attach_xdp import refuse_occupied
    from hookline.bpf._code import Function, Jited, MachineFunction, MachineInstruction, SourceLine, Xlated
    from hookline.bpf._disassemble import Instruction, disassemble
    from hookline.bpf._group import LinkGroup
    from hookline.bpf._holders import Holder, holders, pinned
    from hookline.bpf._iterator import Iterator
    from hookline.bpf._placements import Placement, placements
    from hookline.bpf._query import Hook, HookEntry, query
    from hookline.bpf._source import SourcePlace
    from hookline.bpf._targets import TARGETS, target_types
    from hookline.bpf._trace_pipe import TraceLine, TracePipe, trace_pipe
    from hookline.bpf._verify import Verdict, verify

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
    "target_types",
    "trace_pipe",
    "verify",
]

# What looks into the whole system, and ways onto single hooks, are imported when first named.
_LATER = {
    "cgroup_folder": "_attach_cgroup",
    "MapAttachment": "_attach_socket",
    "SocketAttachment": "_attach_socket",
    "system_call": "_attach_trace",
    "refuse_occupied": "_attach_xdp",
    "LinkGroup": "_group",
    "Iterator": "_iterator",
    "Hook": "_query",
    "HookEntry": "_query",
    "query": "_query",
    "TARGETS": "_targets",
    "target_types": "_targets",
    "Placement": "_placements",
    "placements": "_placements",
    "Function": "_code",
    "Jited": "_code",
    "MachineFunction": "_code",
    "MachineInstruction": "_code",
    "SourceLine": "_code",
    "Xlated": "_code",
    "Instruction": "_disassemble",
    "disassemble": "_disassemble",
    "Holder": "_holders",
    "holders": "_holders",
    "pinned": "_holders",
    "TraceLine": "_trace_pipe",
    "TracePipe": "_trace_pipe",
    "trace_pipe": "_trace_pipe",
    "SourcePlace": "_source",
    "Verdict": "_verify",
    "verify": "_verify",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "features":
        return import_module(f"{__name__}.features")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
