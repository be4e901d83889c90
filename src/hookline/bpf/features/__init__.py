"""What this kernel can do: yes, no, or could not tell, with the reason. Each is asked for once in a process.

    if features.attach("tcx"): ...
    features.map_type("arena"), features.program_type("netfilter"), features.helper("xdp", "bpf_loop")
    raise features.attach("netkit").error()        FeatureMissing or NotPermitted

No probe changes anything: trial programs and maps are closed at once, nothing is attached, no module is loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec

from hookline.bpf._objects import _libbpf
from hookline.bpf._types import _codec
from hookline.bpf.features import _finding, _helpers, _hooks, _kernel, _loading
from hookline.bpf.features._finding import Answer, Finding
from hookline.bpf.features._kernel import config, config_source, lockdown, security_modules

__all__ = [
    "Answer",
    "Finding",
    "attach",
    "btf",
    "config",
    "config_source",
    "forget",
    "helper",
    "hooks",
    "kfunc",
    "libbpf_version",
    "lockdown",
    "map_type",
    "map_types",
    "native_xdp",
    "program_type",
    "program_types",
    "qdisc",
    "security_modules",
    "tcx",
]

_Arguments = ParamSpec("_Arguments")
_cached: list[Callable[[], None]] = []


def _once(function: Callable[_Arguments, Finding]) -> Callable[_Arguments, Finding]:
    answers: dict[object, Finding] = {}
    _cached.append(answers.clear)

    @functools.wraps(function)
    def ask(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Finding:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in answers:
            answers[key] = function(*args, **kwargs)
        return answers[key]

    return ask


def hooks() -> tuple[str, ...]:
    """What `attach` can be asked for."""
    return tuple(_hooks.HOOKS)


def program_types() -> tuple[str, ...]:
    """What `program_type` can be asked for."""
    return tuple(_loading.PROGRAM_RELEASES)


def map_types() -> tuple[str, ...]:
    """What `map_type` can be asked for."""
    return tuple(_loading.MAP_RELEASES)


@_once
def attach(hook: str) -> Finding:
    """Whether programs can be put on a hook, or another ability is there; `hooks` lists the names.

    ``"lsm"`` is a yes only where ``bpf`` is also among the active security modules. Whether an interface runs
    XDP in its driver is `native_xdp`; ``"clsact"`` is `qdisc`'s.

    Raises:
        BpfError: There is no such hook; it says which is meant.
    """
    if hook not in _hooks.HOOKS:
        raise _codec.unknown_name("hook", hook, list(_hooks.HOOKS), "eBPF")
    known = _hooks.HOOKS[hook]
    return _completed(known.probe(), hook, known.minimum_kernel, known.config)


@_once
def program_type(name: str) -> Finding:
    """Whether programs of a type, such as ``"xdp"`` or ``"lsm"``, can be loaded.

    Raises:
        BpfError: There is no such type.
    """
    found = _loading.program_type(name)
    minimum = _loading.PROGRAM_RELEASES[name]
    return _completed(found, found.feature, minimum, _loading.PROGRAM_CONFIG.get(name, ()))


@_once
def map_type(name: str) -> Finding:
    """Whether maps of a type, such as ``"ringbuf"``, can be made.

    Raises:
        BpfError: There is no such type.
    """
    found = _loading.map_type(name)
    return _completed(found, found.feature, _loading.MAP_RELEASES[name], _loading.MAP_CONFIG.get(name, ()))


@_once
def helper(program: str, wanted: str | int) -> Finding:
    """Whether programs of a type may call a helper.

    Args:
        program: The program type.
        wanted: The helper's name, with or without ``bpf_``, or its number.

    Raises:
        BpfError: There is no such type or helper.
    """
    found = _loading.helper(program, wanted)
    own = _helpers.minimum_kernel(_helpers.number_of(wanted))
    minimum = max(own, _loading.PROGRAM_RELEASES[program], key=_finding.version) if own else ""
    return _completed(found, found.feature, minimum, ())


@_once
def kfunc(name: str) -> Finding:
    """Whether the kernel has a function for programs to call, by its own types (not those of its modules)."""
    return _hooks.kfunc(name)


@_once
def native_xdp(interface: str | int) -> Finding:
    """Whether an interface's driver runs XDP programs itself. Before Linux 6.3 only an attempt tells.

    Raises:
        BpfError: There is no such interface in this thread's network namespace.
    """
    return replace(_hooks.native_xdp(interface), minimum_kernel="4.8")


_QDISCS = {
    "clsact": ("sch_ingress", "CONFIG_NET_SCH_INGRESS", "4.5"),
    "fq": ("sch_fq", "CONFIG_NET_SCH_FQ", "3.12"),
    "htb": ("sch_htb", "CONFIG_NET_SCH_HTB", "2.6.0"),
    "tbf": ("sch_tbf", "CONFIG_NET_SCH_TBF", "2.6.0"),
    "fq_codel": ("sch_fq_codel", "CONFIG_NET_SCH_FQ_CODEL", "3.5"),
    "netem": ("sch_netem", "CONFIG_NET_SCH_NETEM", "2.6.8"),
    "police": ("act_police", "CONFIG_NET_ACT_POLICE", "2.6.0"),
    "cls_bpf": ("cls_bpf", "CONFIG_NET_CLS_BPF", "3.13"),
}


@_once
def qdisc(kind: str) -> Finding:
    """Whether a queueing discipline is in the kernel or can be loaded as a module; none is loaded for the answer.

    Traffic control loads a module for whoever names its discipline, so the answer is taken from the kernel's
    configuration and its list of modules, and is "could not tell" where neither can be read.

    Args:
        kind: ``"fq"``, ``"htb"``, ``"clsact"``, ``"tbf"``, ``"fq_codel"``, ``"netem"``; the parts ``"police"`` and
            ``"cls_bpf"`` too.

    Raises:
        BpfError: It is none of these.
    """
    if kind not in _QDISCS:
        raise _codec.unknown_name("queueing discipline", kind, list(_QDISCS), "this probe")
    module, option, minimum = _QDISCS[kind]
    return _completed(_kernel.module(module, option), kind, minimum, (option,))


def tcx() -> Finding:
    """Whether traffic control programs attach by links (Linux 6.6)."""
    return attach("tcx")


@_once
def btf() -> Finding:
    """Whether the kernel carries its own types, which CO-RE needs (CONFIG_DEBUG_INFO_BTF)."""
    path = "/sys/kernel/btf/vmlinux"
    options = ("CONFIG_DEBUG_INFO_BTF",)
    if os.access(path, os.R_OK):
        return Finding("btf", Answer.YES, f"{path} is there", "5.2", options)
    if os.path.exists(path):
        return Finding("btf", Answer.UNKNOWN, f"{path} cannot be read", "5.2", options)
    return Finding("btf", Answer.NO, f"there is no {path}", "5.2", options)


def libbpf_version() -> str:
    """The version of libbpf, such as ``"1.1"``.

    Raises:
        BpfError: It is not installed, or too old.
    """
    return _libbpf.version()


def forget() -> None:
    """Ask the kernel again from now on: for a process whose rights have changed."""
    for clear in _cached:
        clear()
    for function in (
        _loading.program_type, _loading.map_type, _loading.helper, _loading.tracing, _loading.function_id,
        _kernel.module, _kernel.security_modules, _kernel.lockdown, _kernel.config_source, _kernel._options,
    ):  # fmt: skip
        function.cache_clear()


def _completed(found: Finding, feature: str, minimum: str, options: tuple[str, ...]) -> Finding:
    """The finding with what it takes; a no says whether the release or the configuration is the reason."""
    why = found.why
    if found.answer is Answer.NO and not found.policy:
        unset = [option for option in options if config(option) == "n"]
        if _finding.is_older_than(minimum):
            why += f"; it came with Linux {minimum}, and this is {os.uname().release}"
        elif unset and unset[0] not in why:
            why += f"; {unset[0]} is not set"
    return replace(found, feature=feature, why=why, minimum_kernel=minimum, config=options)
