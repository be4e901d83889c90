"""What is known of the kernel without asking bpf(2): its configuration, its modules, its security modules."""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import functools
import os
import re
import zlib
from pathlib import Path

from hookline.bpf.features._finding import Finding, is_older_than, no, unknown, yes

__all__ = ["config", "config_source", "lockdown", "module", "security_modules", "security_text"]

# include/uapi/linux/lsm.h
_LSM_NAMES = {
    100: "capability",
    101: "selinux",
    102: "smack",
    103: "tomoyo",
    104: "apparmor",
    105: "yama",
    106: "loadpin",
    107: "safesetid",
    108: "lockdown",
    109: "bpf",
    110: "landlock",
    111: "ima",
    112: "evm",
    113: "ipe",
}
_LSM_LIST_MODULES = 461
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CREATE = 6


@functools.cache
def config_source() -> str:
    """Where the kernel's configuration can be read, ``""`` where nowhere."""
    release = os.uname().release
    places = ["/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"]
    return next((place for place in places if os.access(place, os.R_OK)), "")


@functools.cache
def _options() -> dict[str, str] | None:
    source = config_source()
    if not source:
        return None
    try:
        data = Path(source).read_bytes()
        text = (zlib.decompress(data, wbits=31) if source.endswith(".gz") else data).decode(errors="replace")
    except (OSError, zlib.error):
        return None
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.MULTILINE))


def config(option: str) -> str | None:
    """An option of the kernel's configuration.

    Returns:
        ``"y"``, ``"m"``, another value, ``"n"`` where it is not set; None where the configuration is not known.
    """
    options = _options()
    return None if options is None else options.get(option, "n").strip('"')


@functools.cache
def module(name: str, option: str) -> Finding:
    """Whether a part of the kernel that may be a module is there or can be loaded. Nothing is loaded for it.

    Args:
        name: The module's name, such as ``"sch_fq"``.
        option: Its option, such as ``"CONFIG_NET_SCH_FQ"``.
    """
    if os.path.exists(f"/sys/module/{name}"):
        return yes(name, "it is loaded")
    set_to = config(option)
    if set_to == "y":
        return yes(name, f"it is built in ({option}=y)")
    if set_to == "n":
        return no(name, f"{option} is not set")
    folder = Path("/lib/modules") / os.uname().release
    for listing, why in (("modules.builtin", "it is built in"), ("modules.dep", "it is a module")):
        with contextlib.suppress(OSError):
            if re.search(rf"/{re.escape(name)}\.ko", (folder / listing).read_text()):
                return yes(name, f"{why} ({folder / listing})")
    if set_to == "m":
        return no(name, f"{option}=m, and {folder} does not have the module")
    if (folder / "modules.dep").exists() and (folder / "modules.builtin").exists():
        return no(name, f"{folder} does not have the module, and it is not loaded")
    return unknown(name, "neither the kernel's configuration nor its modules can be read")


@functools.cache
def security_modules() -> tuple[str, ...] | None:
    """The active Linux security modules in their order, or None where the kernel does not say."""
    names = (ctypes.c_uint64 * 64)()
    size = ctypes.c_uint32(ctypes.sizeof(names))
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(_LSM_LIST_MODULES, names, ctypes.byref(size), 0)
    if found >= 0:
        return tuple(_LSM_NAMES.get(number, f"#{number}") for number in names[:found])
    text = security_text("lsm")
    return tuple(text.split(",")) if text else None


@functools.cache
def lockdown() -> str | None:
    """``"none"``, ``"integrity"``, ``"confidentiality"``, or None where the kernel does not say."""
    text = security_text("lockdown")
    if text is None:
        active = security_modules()
        return "none" if active is not None and "lockdown" not in active else None
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None


def security_text(name: str) -> str | None:
    """A file of securityfs, also where that is mounted nowhere: then it is opened without a place in the tree."""
    with contextlib.suppress(OSError):
        return (Path("/sys/kernel/security") / name).read_text().strip()
    with contextlib.suppress(OSError):
        folder = _detached("securityfs")
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            with open(file) as opened:
                return opened.read().strip()
        finally:
            os.close(folder)
    return None


def _detached(kind: str) -> int:
    """A file system's root as a descriptor that nobody else sees (fsopen(2), fsmount(2); Linux 5.2)."""
    if is_older_than("5.2"):
        raise OSError(errnos.ENOSYS, os.strerror(errnos.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, kind.encode(), 1)
    if context < 0:
        raise OSError(ctypes.get_errno(), f"cannot open {kind}")
    try:
        if libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0) < 0:
            raise OSError(ctypes.get_errno(), f"cannot make {kind}")
        folder = libc.syscall(_FSMOUNT, context, 1, 0)
        if folder < 0:
            raise OSError(ctypes.get_errno(), f"cannot mount {kind}")
        return int(folder)
    finally:
        os.close(context)
