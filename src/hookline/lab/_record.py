"""What is written down about a lab, and who may change it.

``/run/hookline/labs/LAB/lab.json`` is written before anything else of the lab is made, so that whatever a
killed maker left behind can be found. A lock on the folder itself is held by whoever makes, changes or
removes the lab; the kernel releases it when that process ends, however it ends. A folder whose lab is not
``up`` and whose lock is free is therefore what somebody left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hookline.lab._errors import LabError, LabNotPermitted
from hookline.lab._plan import Family
from hookline.lab._processes import Process
from hookline.model.names import lab_run_dir, lab_state_dir, labs_run_dir

Phase: TypeAlias = Literal["making", "up"]

_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of ``lab.json``."""

    name: str
    phase: Phase
    boot: str
    maker: Process
    state: Path
    made_at: float
    families: tuple[Family, ...] = (4, 6)
    server: Process | None = None
    first_node: str = ""
    cgroups: bool = False
    serves: bool = True

    @classmethod
    def begin(
        cls,
        name: str,
        families: tuple[Family, ...],
        first_node: str,
        *,
        cgroups: bool = False,
        serves: bool = True,
    ) -> Record:
        """The record of a lab that this process is about to make."""
        maker = Process.of(os.getpid())
        assert maker is not None, "this process runs"
        return cls(
            name,
            "making",
            boot_id(),
            maker,
            lab_state_dir(name),
            time.time(),
            families,
            first_node=first_node,
            cgroups=cgroups,
            serves=serves,
        )

    @classmethod
    def read(cls, name: str) -> Record | None:
        """The record of a lab, None where there is none that can be read."""
        try:
            document = json.loads((lab_run_dir(name) / "lab.json").read_text())
            server = document["server"]
            return cls(
                name=name,
                phase=document["phase"],
                boot=document["boot"],
                maker=Process(**document["maker"]),
                state=Path(document["state"]),
                made_at=document["madeAt"],
                families=tuple(document["families"]),
                server=Process(**server) if server else None,
                first_node=document["firstNode"],
                cgroups=document.get("cgroups", False),
                serves=document.get("serves", True),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self) -> None:
        """Write the record, whole or not at all."""
        write_json(
            lab_run_dir(self.name) / "lab.json",
            {
                "name": self.name,
                "phase": self.phase,
                "boot": self.boot,
                "maker": _process_document(self.maker),
                "server": _process_document(self.server) if self.server else None,
                "state": str(self.state),
                "madeAt": self.made_at,
                "families": self.families,
                "firstNode": self.first_node,
                "cgroups": self.cgroups,
                "serves": self.serves,
            },
        )

    def with_server(self, server: Process) -> Record:
        """The same with the server's process."""
        return replace(self, server=server)

    def up(self) -> Record:
        """The same, the lab being complete."""
        return replace(self, phase="up")

    @property
    def is_up(self) -> bool:
        """Whether the lab was completed since the machine was booted."""
        return self.phase == "up" and self.boot == boot_id()


@contextlib.contextmanager
def locked(name: str, *, create: bool = False, patience_s: float = 1.0) -> Iterator[Path]:
    """Hold the lock of a lab's folder for the ``with`` block, and give the folder.

    Args:
        name: The lab's.
        create: Make the folder where there is none.
        patience_s: How long to wait for a process that holds it.

    Raises:
        LabError: Another process holds the lock; or there is no such folder.
        FileNotFoundError: There is no such folder, and ``create`` was not asked for.
    """
    folder = lab_run_dir(name)
    if folder.exists() and not os.access(folder, os.W_OK):
        raise _not_permitted(name, folder)
    descriptor = _open_locked(name, folder, create, time.monotonic() + patience_s)
    try:
        yield folder
    finally:
        os.close(descriptor)


def is_locked(name: str) -> bool:
    """Whether a process is making, changing or removing a lab now."""
    try:
        with locked(name, patience_s=0):
            return False
    except LabError:
        return True
    except FileNotFoundError:
        return False


def recorded_labs() -> list[str]:
    """The names of all labs that have a folder."""
    try:
        return sorted(entry.name for entry in os.scandir(labs_run_dir()) if entry.is_dir())
    except FileNotFoundError:
        return []


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)


def boot_id() -> str:
    """What is different after every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _open_locked(name: str, folder: Path, create: bool, deadline: float) -> int:
    while True:
        try:
            if create:
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if create:
                continue  # another lab's end took the empty parent away
            raise
        except PermissionError:
            raise _not_permitted(name, folder) from None
        held = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), folder.stat())
            if held:
                return descriptor
        except FileNotFoundError:
            pass  # removed while we waited for it
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_RETRY_S)
                continue
            raise LabError(
                f"lab {name} is being made, changed or removed",
                why="another process is at it",
                remedy="wait for it, or end it; then: hookline lab list",
            ) from None
        finally:
            if not held:
                os.close(descriptor)


def _not_permitted(name: str, folder: Path) -> LabNotPermitted:
    return LabNotPermitted(
        f"cannot make or change lab {name}", why=f"this user may not write {folder}", remedy="run as root"
    )


def _process_document(process: Process) -> dict[str, int]:
    return {"pid": process.pid, "started": process.started}
