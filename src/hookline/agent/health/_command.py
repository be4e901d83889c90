"""Command checks: a program, without a shell, that says by its exit status whether a backend is well."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess

from hookline.agent.health.checks import OWN_TROUBLE, Backend, CheckError
from hookline.model import HealthCheck

_REAP_SECONDS, _REAP_TRIES = 0.002, 25


async def run(how: HealthCheck, backend: Backend) -> None:
    """Runs the command in the calling thread's network namespace, in a process group of its own.

    The whole group is killed when the command ends or its time is up, while a zombie keeps its number from being given to others.

    Raises:
        CheckError: Another exit status than 0, a signal, or it cannot be started.
    """
    try:
        process = subprocess.Popen(
            how.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(how, backend),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        if error.errno in OWN_TROUBLE:
            raise
        raise CheckError("command", f"{how.command[0]}: {error.strerror}") from None
    try:
        await _ended(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = await _reap(process)
    if status < 0:
        raise CheckError("signal", f"ended by signal {-status}")
    if status:
        raise CheckError("exit-status", f"exit status {status}")


async def _ended(number: int) -> None:
    """Waits until a child has ended, and leaves it to be reaped."""
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(number)
    ended: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(descriptor, _note, ended)
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _note(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _reap(process: subprocess.Popen[bytes]) -> int:
    """Its exit status; one that does not die at once is waited for later, so that it holds up nobody."""
    for _ in range(_REAP_TRIES):
        if (status := process.poll()) is not None:
            return status
        await asyncio.sleep(_REAP_SECONDS)
    _reap_later(process)
    return 0


def _reap_later(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        asyncio.get_running_loop().call_later(1.0, _reap_later, process)


def _environment(how: HealthCheck, backend: Backend) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOOKLINE_SERVICE": backend.service,
        "HOOKLINE_PORT": backend.service_port,
        "HOOKLINE_PROTOCOL": backend.protocol.lower(),
        "HOOKLINE_BACKEND_ADDRESS": str(backend.address),
        "HOOKLINE_BACKEND_PORT": str(backend.port),
        "HOOKLINE_TIMEOUT_SECONDS": f"{how.timeout_seconds:g}",
    }
