"""One agent to a node: a lock on a file that says who has it. The kernel frees it when the process ends, however that happens."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from hookline.agent._errors import AgentError
from hookline.model.names import NodeName


@contextmanager
def sole_agent(name: NodeName) -> Iterator[None]:
    """Holds the node's agent lock.

    Raises:
        AgentError: Another agent has it, or the folder cannot be made.
    """
    path = name.run_dir / "agent.lock"
    try:
        name.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AgentError(
            f"the agent's lock cannot be taken: {path}",
            why=error.strerror or str(error),
            remedy="run as root, with a writable /run/hookline",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AgentError(
                f"node {name} has an agent already",
                why=f"process {owner} holds {path}",
                remedy=f"end that one first: kill {owner}",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
