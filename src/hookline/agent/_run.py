"""The agent: one process for one node, which keeps the kernel at what the files and the command line ask for.

One asyncio loop waits for everything: files that change, the kernel's network messages, clients, signals, the clock. One thread
has the node, and every change goes through it, in order. All waiting is by the monotonic clock; the wall clock is for the log
alone, so stepping it disturbs nothing.

Ending it, in whatever way, takes nothing out of the kernel. The next agent finds it there and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from hookline import net
from hookline.agent import _logs, _server
from hookline.agent._errors import AgentError
from hookline.agent._files import SETTLED_S, Files, Watcher
from hookline.agent._lock import sole_agent
from hookline.agent._logs import LogFormat, error_fields, fields, log
from hookline.agent._metrics import Look, Metrics
from hookline.agent._notify import notify, watchdog_seconds
from hookline.agent._wire import Change
from hookline.agent._worker import LOOK_PATIENCE_S, Worker
from hookline.agent.health import HealthSupervisor
from hookline.control import Applied, Conflict, Counted, Generation, Node, NotThere, Plan, Repaired
from hookline.control.health import Health, HealthKey
from hookline.control.pools import Pool
from hookline.datapath.loadbalancer import maglev
from hookline.errors import HooklineError
from hookline.model.names import NodeName

SETTLE_S = 0.003
"""After a file's change, so that a handful that are written together are read together."""
NETWORK_SETTLE_S = 0.05
FULL_CHECK_EVERY_S = 1.0
"""Routes may flap: what they ask for is worked out at most this often."""
CHECK_EVERY_S = 5.0
RETRY_FIRST_S, RETRY_LONGEST_S = 0.1, 30.0
"""What a part of the agent waits after a fault of its own, twice as long after each that follows."""
SCRAPE_WAITS_S = 0.25
"""For a fresh look at the counters; then the last one is served. Prometheus gives a scrape its interval's time."""
SERVICES_A_STEP = 500
"""Of a look, which lets changes go first between its steps: about 50 ms."""
LOOK_REST = 4
"""Looks have a fifth of the time at most, however often somebody scrapes."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Settings:
    """How an agent runs.

    Attributes:
        paths: Files and folders to watch.
        metrics: ``ADDRESS:PORT`` to serve metrics at, beside the socket; empty for none.
        check_every_s: Between two looks at the kernel, if nothing happens.
    """

    paths: Sequence[str] = ()
    metrics: str = ""
    check_every_s: float = CHECK_EVERY_S
    log_format: LogFormat = "text"
    log_level: str = "info"


class Changes:
    """Counts what changed, and wakes those who wait for the next."""

    def __init__(self) -> None:
        self.number = 0
        self._condition = asyncio.Condition()

    async def tell(self) -> None:
        """Something changed."""
        async with self._condition:
            self.number += 1
            self._condition.notify_all()

    async def wait(self, seen: int, seconds: float) -> None:
        """Waits until something changes after the number ``seen``, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._condition:
                await self._condition.wait_for(lambda: self.number != seen)


class Agent:
    """What the parts of an agent share.

    Attributes:
        worker: The thread that has the node.
        changes: Told of every change that was carried out.
        stopping: Set when the agent ends.
    """

    def __init__(self, name: NodeName, open_node: Callable[[], Node], settings: Settings) -> None:
        import hookline

        self.name = name
        self.settings = settings
        self.worker = Worker(open_node)
        self.files = Files(settings.paths, min(SETTLED_S, settings.check_every_s))
        self.metrics = Metrics(str(name), hookline.__version__)
        self.changes = Changes()
        self.stopping = asyncio.Event()
        self.failure: HooklineError | None = None
        self._version = hookline.__version__
        self._problems: list[str] = []
        self._look_at_files = asyncio.Event()
        self._changed_files: set[str] = set()
        self._any_file = False
        self._look_at_kernel = asyncio.Event()
        self._full_check = False
        self._last_full = -FULL_CHECK_EVERY_S
        self._first_event: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._health = HealthSupervisor(self._report_health, namespace=name.netns)
        self._checked: Mapping[str, Sequence[Pool]] | None = None
        self._told: set[asyncio.Task[None]] = set()
        self._to_start: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._later: dict[int, asyncio.TimerHandle] = {}
        self._connections, self._tracked = Counted(), Counted()
        self._looking: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._seen, self._seen_at = b"", -math.inf

    # -- what clients ask for

    def status(self) -> dict[str, Any]:
        """What ``/v1/health`` says."""
        files = self.files.problems()
        lost = [
            f"folder {folder}: {why}; what its files said stays" for folder, why in self.files.lost.items()
        ]
        if self.files.stale is not None:
            lost.append(f"what files that are gone described is not removed yet: {self.files.stale}")
        return {
            "status": "degraded" if files or lost or self._problems else "ok",
            "node": str(self.name),
            "version": self._version,
            "pid": os.getpid(),
            "state": str(self.name.state_dir),
            "files": [
                {"file": path, "objects": len(known.references), "problem": _said(files.get(path))}
                | ({"waiting": True} if known.waiting else {})
                for path, known in sorted(self.files.known.items())
            ],
            "folders": list(self.files.folders),
            "problems": [*lost, *self._problems],
        }

    async def apply(self, change: Change) -> Applied:
        """Carries out what a client wants applied.

        Raises:
            Conflict: An object is of a file that this agent watches.
            HooklineError: The node refuses.
        """
        resources = [item.resource() for item in change.items]

        def carry_out(node: Node) -> Applied:
            self._refuse_owned(node, (one.reference for one in resources), change)
            return node.apply(resources, prune=change.prune or False)

        return await self._changed("api", carry_out)

    async def plan(self, change: Change) -> Plan:
        """What `apply` or `delete` would do."""
        resources = [item.resource() for item in change.items]

        def work_out(node: Node) -> Plan:
            self._refuse_owned(node, [*(one.reference for one in resources), *change.delete], change)
            return node.plan(resources, prune=change.prune or False, delete=change.delete)

        return await self.worker.call(work_out)

    async def delete(self, references: Sequence[str]) -> Applied:
        """Removes objects by reference."""

        def carry_out(node: Node) -> Applied:
            self._refuse_owned(node, references, None)
            return node.delete(references)

        return await self._changed("api", carry_out)

    async def _changed(self, source: str, carry_out: Callable[[Node], Applied]) -> Applied:
        start = time.monotonic()
        try:
            applied = await self.worker.call(carry_out)
        except HooklineError as error:
            self.metrics.changes.labels(source, "refused").inc()
            log.warning("change refused", extra=fields(source=source, **error_fields(error)))
            raise
        took = time.monotonic() - start
        self.metrics.changes.labels(source, "applied").inc()
        self.metrics.change_seconds.labels(source).observe(took)
        counts = {"created": "create", "changed": "change", "removed": "remove"}
        log.info(
            "change applied",
            extra=fields(
                source=source,
                **{
                    name: sum(one.action == action for one in applied.plan.resources)
                    for name, action in counts.items()
                },
                took_ms=round(took * 1e3, 1),
            ),
        )
        await self.changes.tell()
        return applied

    def _refuse_owned(self, node: Node, references: Iterable[str], change: Change | None) -> None:
        """Objects of watched files are changed in the files."""
        if not self.files:
            return
        sources = [item.source for item in change.items] if change is not None else []
        if change is not None and change.prune is not None:
            sources += [*change.prune.files, *(f"{folder}/any" for folder in change.prune.folders)]
        for source in sources:
            if source in self.files:
                raise Conflict(
                    f"{source.removesuffix('/any')} belongs to the agent of node {self.name}",
                    why=f"process {os.getpid()} watches it, and applies it itself when it changes",
                    remedy="change the file; or end the agent first",
                )
        for reference in references:
            with contextlib.suppress(NotThere):
                source = node.source_of(reference)
                if source in self.files:
                    raise Conflict(
                        f"{reference} belongs to the agent of node {self.name}",
                        why=f"it is in {source}, which process {os.getpid()} watches and would apply again",
                        remedy=f"change {source}",
                    )

    async def rollback(self, to: int | None) -> Applied:
        """Goes back to an earlier generation.

        Raises:
            Conflict: That would change objects of watched files.
        """

        def carry_out(node: Node) -> Applied:
            self._refuse_rollback(node, to)
            return node.rollback(to)

        return await self._changed("api", carry_out)

    async def plan_rollback(self, to: int | None) -> Plan:
        """What `rollback` would do."""

        def work_out(node: Node) -> Plan:
            self._refuse_rollback(node, to)
            return node.plan_rollback(to)

        return await self.worker.call(work_out)

    async def generations(self) -> list[Generation]:
        """The changes that are kept, the newest first."""
        return await self.worker.call(lambda node: node.generations())

    def _refuse_rollback(self, node: Node, to: int | None) -> None:
        if self.files:
            plan = node.plan_rollback(to)
            changed = [one.reference for one in plan.resources if one.action != "keep"]
            self._refuse_owned(node, changed, None)

    async def metrics_text(self, wait_s: float = SCRAPE_WAITS_S) -> bytes:
        """The exposition for Prometheus: the kernel's counters by the last look, which says how old it is.

        Asks for a look, unless looks take too much of the node's thread already, and waits a moment for it: what is being
        changed or mended must not make a scrape late.

        Args:
            wait_s: How long the answer may wait for a fresh look.
        """
        if self._looking is None or (
            self._looking.done() and (time.monotonic() >= self._next_look or wait_s > SCRAPE_WAITS_S)
        ):
            self._looking = asyncio.create_task(self._look())
        if not self._looking.done():
            await asyncio.wait([self._looking], timeout=wait_s)
        self.metrics.problems.labels("file").set(len(self.files.problems()))
        self.metrics.problems.labels("folder").set(len(self.files.lost) + (self.files.stale is not None))
        self.metrics.problems.labels("node").set(len(self._problems))
        return self._seen + self.metrics.own_text(self._seen_at)

    async def _look(self) -> None:
        """Reads the node's counters and makes them text. Each step lets changes go first."""
        worker, start = self.worker, time.monotonic()
        busy = 0.0

        async def step(read: Callable[[Node], Answer]) -> Answer:
            nonlocal busy

            def timed(node: Node) -> tuple[Answer, float]:
                begin = time.monotonic()
                return read(node), time.monotonic() - begin

            answer, took = await worker.call(timed, patience_s=LOOK_PATIENCE_S)
            busy += took
            return answer

        try:
            look = Look(await step(lambda node: node.totals()))
            look.usage = await step(lambda node: node.map_usage(self._connections, self._tracked))
            look.firewall = await step(lambda node: node.policy_totals())
            look.rules = await step(lambda node: node.rule_counts())
            names = await step(lambda node: node.served())
            for first in range(0, len(names), SERVICES_A_STEP):
                some = names[first : first + SERVICES_A_STEP]
                look.pools += await step(partial(Node.services, names=some))
            counters, states = await asyncio.to_thread(
                lambda: (self._health.counters(), self._health.states())
            )
            look.health = counters
            look.health_states = {str(state): count for state, count in states.items()}
            began = time.monotonic()
            self._seen = await asyncio.to_thread(self.metrics.kernel_text, look)
            self._seen_at = start
            busy += time.monotonic() - began
        except HooklineError as error:
            if not self.stopping.is_set():
                log.warning("no look at the counters", extra=fields(**error_fields(error)))
        except Exception as error:
            self._note_fault("metrics", error)
        self._next_look = time.monotonic() + busy * LOOK_REST

    # -- files

    async def bring_files(self, changed: set[str] | None = None, since: float | None = None) -> None:
        """Reads watched files, all with None, and has the kernel follow."""
        start = time.monotonic() if since is None else since
        brought = await self.worker.call(lambda node: self.files.bring(node, changed))
        if brought.faults:
            self.metrics.faults.labels("files").inc(brought.faults)
        if brought.refused:
            self.metrics.changes.labels("file", "refused").inc(brought.refused)
        if brought.applied:
            self.metrics.changes.labels("file", "applied").inc(len(brought.applied))
            self.metrics.change_seconds.labels("file").observe(time.monotonic() - start)
            await self.changes.tell()

    def _files_changed(self, watcher: Watcher) -> None:
        found = watcher.read()
        if found is None:
            self._any_file = True
        elif found:
            self._changed_files |= found
        else:
            return
        if self._first_event is None:
            self._first_event = time.monotonic()
        self._look_at_files.set()

    def read_again(self) -> None:
        """Has every watched file looked at, as SIGHUP asks for."""
        log.info("reading all files again")
        self._any_file = True
        self._look_at_files.set()
        self._full_check = True
        self._look_at_kernel.set()

    async def _follow_files(self, watcher: Watcher) -> None:
        longest = self.settings.check_every_s
        longest = min(longest, SETTLED_S) if self.files.unsettled else longest
        soon = self.files.next_try_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest if soon is None else min(longest, soon)):
                await self._look_at_files.wait()
                await asyncio.sleep(SETTLE_S)
        due = self.files.due()
        woken = self._look_at_files.is_set() or bool(due)
        since, self._first_event = self._first_event, None
        changed, self._changed_files = self._changed_files | due, set()
        anything, self._any_file = self._any_file, False
        self._look_at_files.clear()
        try:
            told = anything
            anything = watcher.rewatch() or anything or not woken
            if anything:
                # What messages missed, and what was refused before and may be taken now.
                changed |= await asyncio.to_thread(self.files.changed, links=told)
            if changed or self.files.is_due:
                await self.bring_files(changed, since)
        except Exception:
            # Nothing that was told is forgotten: the next try looks at the same, and at all that is different.
            self._changed_files |= changed
            self._any_file = True
            self._look_at_files.set()
            raise

    # -- the kernel

    async def check(self, *, full: bool = False) -> Repaired:
        """Looks at the kernel and mends it; says and counts what was mended.

        Raises:
            HooklineError: It cannot be mended.
        """
        start = time.monotonic()
        try:
            repaired = await self.worker.call(lambda node: node.repair(full=full), patience_s=LOOK_PATIENCE_S)
        except NotThere:
            raise
        except HooklineError as error:
            self.metrics.checks.labels("failed").inc()
            self._note_problems([str(error)])
            raise
        self.metrics.check_seconds.observe(time.monotonic() - start)
        self.metrics.checks.labels("repaired" if repaired.repairs else "clean").inc()
        for repair in repaired.repairs:
            self.metrics.repairs.labels(repair.kind).inc()
            log.warning("repaired", extra=fields(kind=repair.kind, what=repair.what))
        self._note_problems(repaired.problems)
        if repaired.repairs:
            await self.changes.tell()
        return repaired

    def _note_problems(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._problems:
                log.error("problem", extra=fields(problem=problem))
        for problem in self._problems:
            if problem not in problems:
                log.info("problem is gone", extra=fields(problem=problem))
        self._problems = problems

    def _network_changed(self, monitor: net.Monitor) -> None:
        found = monitor.read()
        if found & {"address", "route"}:
            self._full_check = True
        if found:
            self._look_at_kernel.set()

    async def _follow_kernel(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.check_every_s):
                await self._look_at_kernel.wait()
                await asyncio.sleep(NETWORK_SETTLE_S)
        self._look_at_kernel.clear()
        full = self._full_check
        if full and time.monotonic() - self._last_full < FULL_CHECK_EVERY_S:
            await asyncio.sleep(FULL_CHECK_EVERY_S)
        self._full_check = False
        if full:
            self._last_full = time.monotonic()
        try:
            await self.check(full=full)
        except NotThere as error:
            # The lab was taken down: there is no node to keep.
            self.failure = error
            self.stopping.set()
        except HooklineError:
            self._full_check = full or self._full_check  # said already; the next look tries the same again
        except Exception:
            self._full_check = full or self._full_check
            self._look_at_kernel.set()
            raise

    # -- health checks

    def _report_health(self, changes: Mapping[HealthKey, Health]) -> Future[object]:
        """Carries out what the checks found; called in their thread."""
        found: Future[object] = self.worker.submit(lambda node: node.observe(changes))
        found.add_done_callback(lambda _: self._tell_changes())
        return found

    def _tell_changes(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed this very moment
                loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        # The loop itself keeps no more than a weak reference to a task.
        task = asyncio.create_task(self.changes.tell())
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    def _follow_documents(self, node: Node) -> None:
        """Has the checks follow what is wanted; called in the node's thread after everything that it does."""
        if self._checked is None or self.stopping.is_set():
            return  # they have not begun, or have ended
        try:
            documents = node.documents
            if documents is not self._checked:
                self._health.update(documents, node.health)
                self._checked = documents
        except HooklineError:
            pass  # whoever asked for what could not be done is told
        except Exception as error:
            # Not what was asked for, which is done: its answer must not become this one.
            self._note_fault("documents", error)

    def _begin_checks(self, node: Node) -> None:
        node.watched = True
        self._checked = node.documents
        self._health.start(self._checked, node.health)

    async def _follow_drains(self) -> None:
        """Ends drains when their time is over."""
        number = self.changes.number
        try:
            seconds = await self.worker.call(lambda node: node.expire())
        except HooklineError as error:
            log.error("drains could not be ended", extra=fields(**error_fields(error)))
            seconds = None
        longest = self.settings.check_every_s
        await self.changes.wait(number, longest if seconds is None else min(max(seconds, 0.0), longest))

    # -- the service manager

    async def _tell_watchdog(self, seconds: float) -> None:
        """Says that the agent is well as long as the node's thread answers."""
        await self.worker.call(lambda _: None)
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 3)

    # -- faults of its own

    async def _keep_on(self, part: str, turn: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Takes one turn after the other until the agent ends. A turn that fails, in whatever way, is not the last."""
        delay = RETRY_FIRST_S
        while True:
            try:
                await turn()
            except Exception as error:
                self._note_fault(part, error, again_in_s=delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_LONGEST_S)
            else:
                delay = RETRY_FIRST_S

    def _note_fault(self, part: str, error: BaseException, **values: Any) -> None:
        """Says where what nobody expected happened, and counts it; called in any thread."""
        self.metrics.faults.labels(part).inc()
        log.error(
            "unexpected error, the agent goes on",
            extra=fields(part=part, **values, **error_fields(error)),
            exc_info=error,
        )

    def _listen(self, descriptor: int, part: str, read: Callable[[], None]) -> None:
        """Has the loop read a descriptor. One that cannot be read is left alone for a while: it stays readable all the time."""
        loop = asyncio.get_running_loop()
        delay = RETRY_FIRST_S

        def safely() -> None:
            nonlocal delay
            try:
                read()
                delay = RETRY_FIRST_S
            except Exception as error:
                self._note_fault(part, error, again_in_s=delay)
                loop.remove_reader(descriptor)
                self._later[descriptor] = loop.call_later(delay, loop.add_reader, descriptor, safely)
                delay = min(2 * delay, RETRY_LONGEST_S)
                # What it would have said is looked for.
                self._any_file = self._full_check = True
                self._look_at_files.set()
                self._look_at_kernel.set()

        loop.add_reader(descriptor, safely)

    def _listen_no_more(self, descriptor: int) -> None:
        later = self._later.pop(descriptor, None)
        if later is not None:
            later.cancel()
        asyncio.get_running_loop().remove_reader(descriptor)

    def stop(self) -> None:
        """Ends the agent; what is in the kernel stays."""
        log.info("ending; the kernel goes on as it is")
        self.stopping.set()

    # -- all of it

    async def run(self) -> None:
        """Runs until it is stopped."""
        loop = self._loop = asyncio.get_running_loop()
        self.worker.after = self._follow_documents
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.read_again)
        listener = _server.unix_socket(self.name)
        try:
            tcp = _server.tcp_socket(self.settings.metrics) if self.settings.metrics else None
            async with self._watched() as watcher:
                await self._start()
                tasks = [
                    self._keep_on("start", self._follow_start),
                    self._keep_on("kernel", self._follow_kernel),
                    self._keep_on("drains", self._follow_drains),
                ]
                if watcher is not None:
                    tasks.append(self._keep_on("files", partial(self._follow_files, watcher)))
                watchdog = watchdog_seconds()
                if watchdog is not None:
                    tasks.append(self._keep_on("watchdog", partial(self._tell_watchdog, watchdog)))
                await self._serve(listener, tcp, tasks)
        finally:
            notify("STOPPING=1")
            with contextlib.suppress(OSError):
                self.name.agent_socket.unlink()
            await asyncio.to_thread(self._health.stop)
            await self.worker.close()
        if self.failure is not None:
            raise self.failure

    async def _start(self) -> None:
        """The state and the files, then what somebody else changed while no agent was there.

        Only a node that is not there ends the agent. What fails is tried again once it serves.
        """
        await self._first(self._recover)
        if self.files:
            try:
                await self.bring_files()
            except Exception as error:
                self._note_fault("files", error)
                self._any_file = True
                self._look_at_files.set()
        try:
            await self.check()
        except HooklineError:
            pass  # said already
        except Exception as error:
            self._note_fault("kernel", error)
        await self._first(self._say_found)
        await self._first(self._start_checks)
        _settle_memory()

    async def _first(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Takes a step of the start, or leaves it to `_follow_start`."""
        try:
            await step()
        except NotThere:
            raise
        except Exception as error:
            self._note_fault("start", error)
            self._to_start.append(step)

    async def _follow_start(self) -> None:
        """Takes the steps that failed at the start, in order."""
        while self._to_start:
            await self._to_start[0]()
            del self._to_start[0]
        await asyncio.Event().wait()  # until it is cancelled

    async def _say_found(self) -> None:
        await self.worker.call(_found)

    async def _start_checks(self) -> None:
        await self.worker.call(self._begin_checks)

    async def _recover(self) -> None:
        state = await self.worker.call(lambda node: node.recover())
        if not state.healthy:
            log.warning(
                "the wanted state was lost, or a part of it; what the kernel serves goes on",
                extra=fields(
                    why=state.lost,
                    kept_at=str(state.kept_at or ""),
                    taken_over=len(state.restored),
                    lost=list(state.unreadable),
                    unclaimed=[str(one) for one in state.unclaimed],
                ),
            )

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[Watcher | None]:
        """Watches files and the network before the first look, so that nothing falls in between."""
        monitor = net.Monitor(self.name.netns)
        watcher = Watcher(self.files) if self.files else None
        self._listen(monitor.fileno(), "kernel", partial(self._network_changed, monitor))
        if watcher is not None:
            self._listen(watcher.fileno(), "files", partial(self._files_changed, watcher))
        try:
            yield watcher
        finally:
            self._listen_no_more(monitor.fileno())
            monitor.close()
            if watcher is not None:
                self._listen_no_more(watcher.fileno())
                watcher.close()

    async def _serve(
        self,
        listener: socket.socket,
        tcp: socket.socket | None,
        tasks: Sequence[Coroutine[Any, Any, None]],
    ) -> None:
        servers = [_server.serve(_server.application(self), listener)]
        if tcp is not None:
            servers.append(_server.serve(_server.metrics_application(self), tcp))
        running = [asyncio.create_task(task) for task in tasks]
        stopping = asyncio.create_task(self.stopping.wait())
        log.info(
            "ready",
            extra=fields(
                node=str(self.name),
                socket=str(self.name.agent_socket),
                metrics=self.settings.metrics or "socket only",
                files=len(self.files.known),
            ),
        )
        notify("READY=1", f"STATUS=node {self.name}")
        done, _ = await asyncio.wait(
            [stopping, *running, *(task for _, task in servers)], return_when=asyncio.FIRST_COMPLETED
        )
        self.stopping.set()
        for server, _ in servers:
            server.should_exit = True
        if self._looking is not None:
            self._looking.cancel()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, stopping, *(task for _, task in servers), return_exceptions=True)
        for task in done - {stopping}:
            error = None if task.cancelled() else task.exception()
            if error is not None and self.failure is None:
                raise error


def _settle_memory() -> None:
    """What was read at the start stays: the collector need not look at it again and again, and what reading took goes back."""
    maglev.forget_hashes()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # a C library without it keeps the memory


def _found(node: Node) -> None:
    there = node.attachments()
    if there:
        hooks = " ".join(sorted({f"{one.program}@{one.interface or one.hook}" for one in there}))
        log.info("in the kernel", extra=fields(attachments=hooks))


def _said(error: HooklineError | None) -> dict[str, str] | None:
    return None if error is None else error.as_dict()


def run(name: NodeName, open_node: Callable[[], Node], settings: Settings) -> None:
    """Runs a node's agent until it is told to end.

    Args:
        name: The node.
        open_node: Makes the node; called in the thread that has it.
        settings: How.

    Raises:
        AgentError: There is one already, a path is not there, or a socket cannot be made.
        HooklineError: The node cannot be worked on.
    """
    for path in settings.paths:
        if not os.path.exists(path):
            raise AgentError(
                f"{path} cannot be watched",
                why="there is no such file or folder, and the objects that it set would be removed",
                remedy="check the path, or make it first",
            )
    with sole_agent(name):
        _logs.start(settings.log_format, settings.log_level, node=str(name))
        asyncio.run(Agent(name, open_node, settings).run())
