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

from hookline.bpf import features, pin
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
from hookline.bpf._link import Link, LinkInfo, refuse_occupied
from hookline.bpf._map import Map, MapDefinition
from hookline.bpf._object import Constants, Object
from hookline.bpf._program import Program, TestRun
from hookline.bpf._ring import Backlog, Ring
from hookline.bpf._syscall import AttachType, possible_cpus
from hookline.bpf._system import links, maps, programs, run_statistics
from hookline.bpf.pin import ensure_bpffs, ensure_tracefs

__all__ = [
    "AttachType",
    "Backlog",
    "BpfError",
    "Btf",
    "ClsactFilter",
    "Constants",
    "FeatureMissing",
    "Link",
    "LinkChanged",
    "LinkInfo",
    "Map",
    "MapDefinition",
    "MapFull",
    "NotPermitted",
    "Object",
    "ObjectError",
    "Program",
    "ProgramInfo",
    "Ring",
    "TestRun",
    "VerifierError",
    "ensure_bpffs",
    "ensure_tracefs",
    "features",
    "lacking",
    "links",
    "maps",
    "pin",
    "possible_cpus",
    "programs",
    "refuse_occupied",
    "run_statistics",
]
