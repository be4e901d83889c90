"""A node as its agent has it: the same calls as `hookline.control.Node`, over the socket."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from hookline.agent import _wire
from hookline.agent._errors import AgentError, AgentHangs, from_wire
from hookline.control import Applied, Covered, Generation, NotThere, Plan, PoolStatus, load
from hookline.control.verdicts import RuleCount
from hookline.datapath.firewall.firewall import Totals as FirewallTotals
from hookline.datapath.loadbalancer.balancer import Attachment, Totals
from hookline.model import Resource
from hookline.model.names import NodeName
from hookline.sources.files import STANDARD_INPUT

PathLike = str | os.PathLike[str]
# Whether it lives is said by the loop that serves, whatever else it does: one that takes longer for that than a person
# waits gladly hangs. A change is worth more patience, as it is refused then; what was asked for may take its time.
_LIVES_S, _LIVES_FOR_CHANGE_S, _ANSWER_S = 2.0, 5.0, 600.0
_AGAIN_S = 0.02


class RemoteNode:
    """The node of an agent that answers. Close it, or use it as a context manager.

    Attributes:
        health: What the agent said of itself.
    """

    def __init__(self, name: NodeName, client: httpx.Client, health: dict[str, Any]) -> None:
        self.name = name
        self.health = health
        self._client = client
        self._known: dict[str, tuple[Resource, str]] | None = None

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- changing

    def apply(
        self, what: PathLike | Resource | Iterable[PathLike | Resource], *, prune: bool = False
    ) -> Applied:
        """As `hookline.control.Node.apply`; files are read here, where the paths mean what was typed."""
        given = _given(what)
        change = _change(given, prune=prune)
        self._known = None
        return _wire.APPLIED.validate_json(self._post("apply", change))

    def plan(
        self,
        what: PathLike | Resource | Iterable[PathLike | Resource] = (),
        *,
        prune: bool = False,
        delete: Sequence[str] = (),
    ) -> Plan:
        """As `hookline.control.Node.plan`."""
        change = _change(_given(what), prune=prune, delete=delete)
        return _wire.PLAN.validate_json(self._post("plan", change))

    def delete(self, references: Sequence[str]) -> Applied:
        """As `hookline.control.Node.delete`."""
        self._known = None
        change = _wire.Change([], None, tuple(references))
        return _wire.APPLIED.validate_json(self._post("delete", change))

    def rollback(self, to: int | None = None) -> Applied:
        """As `hookline.control.Node.rollback`."""
        self._known = None
        return _wire.APPLIED.validate_json(
            self._answer("POST", f"rollback?to={'' if to is None else to}", None)
        )

    def plan_rollback(self, to: int | None = None) -> Plan:
        """As `hookline.control.Node.plan_rollback`."""
        wanted = f"rollback?plan=true&to={'' if to is None else to}"
        return _wire.PLAN.validate_json(self._answer("POST", wanted, None))

    # -- reading

    def generations(self) -> list[Generation]:
        """The changes that are kept, the newest first."""
        return _wire.GENERATIONS.validate_json(self._get("generations"))

    def resources(self, kind: type[Resource] | None = None) -> list[Resource]:
        """The wanted objects, of one kind or all."""
        found = (resource for resource, _ in self._all().values())
        return [resource for resource in found if kind is None or isinstance(resource, kind)]

    def source_of(self, reference: str) -> str:
        """What set an object.

        Raises:
            NotThere: There is no such object.
        """
        known = self._all()
        if reference not in known:
            raise NotThere.of(reference, known, self.name)
        return known[reference][1]

    def services(self) -> list[PoolStatus]:
        """Every service's pools, as the kernel has them."""
        return _wire.STATUSES.validate_json(self._get("services"))

    def totals(self) -> Totals | None:
        """The node's counters; None where nothing is loaded."""
        return _wire.TOTALS.validate_json(self._get("totals"))

    def policy_totals(self) -> FirewallTotals | None:
        """The firewall's counters by reason and direction, without those of rules; None where no policy is for this node."""
        sent = _wire.POLICY_TOTALS.validate_json(self._get("policy-totals"))
        return sent.totals() if sent is not None else None

    def rule_counts(self) -> list[RuleCount]:
        """As `hookline.control.Node.rule_counts`."""
        return _wire.RULE_COUNTS.validate_json(self._get("rule-counts"))

    def attachments(self) -> list[Attachment]:
        """Where the node's programs are attached now."""
        return _wire.ATTACHMENTS.validate_json(self._get("attachments"))

    def updates(self, interval_s: float) -> Iterator[_wire.Update]:
        """What changes, as it changes; the first has everything. Ends when the agent does."""
        try:
            with self._client.stream(
                "GET", "/v1/watch", params={"interval": interval_s}, timeout=_ANSWER_S
            ) as answer:
                if answer.status_code != 200:
                    raise from_wire(json.loads(answer.read()))
                for line in answer.iter_lines():
                    if line:
                        yield _wire.read_update(line)
        except httpx.HTTPError as error:
            raise self._lost(error) from error

    def _all(self) -> dict[str, tuple[Resource, str]]:
        if self._known is None:
            items = _wire.ITEMS.validate_json(self._get("resources"))
            found = [(item.resource(), item.source) for item in items]
            self._known = {resource.reference: (resource, source) for resource, source in found}
        return self._known

    # -- asking

    def _get(self, what: str) -> bytes:
        return self._answer("GET", what, None)

    def _post(self, what: str, change: _wire.Change) -> bytes:
        return self._answer("POST", what, _wire.CHANGE.dump_json(change))

    def _answer(self, method: str, what: str, body: bytes | None) -> bytes:
        try:
            answer = self._client.request(method, f"/v1/{what}", content=body)
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        if answer.status_code != 200:
            raise from_wire(answer.json())
        return answer.content

    def _lost(self, error: Exception) -> AgentError:
        return AgentError(
            f"the agent of node {self.name} did not answer to the end",
            why=str(error) or type(error).__name__,
            remedy="see its log; the same command again goes on from where it was",
        )


def _given(what: PathLike | Resource | Iterable[PathLike | Resource]) -> list[PathLike | Resource]:
    return [what] if isinstance(what, str | os.PathLike | Resource) else list(what)


def _change(given: list[PathLike | Resource], *, prune: bool, delete: Sequence[str] = ()) -> _wire.Change:
    resources = load(given)
    covered = Covered.of(given, resources) if prune else None
    return _wire.Change(_wire.items((one, _source(one)) for one in resources), covered, tuple(delete))


def _source(resource: Resource) -> str:
    if resource.origin is None:
        return ""
    path = resource.origin.path
    return path if path == STANDARD_INPUT else os.path.abspath(path)


def _is_served(name: NodeName, deadline: float) -> bool:
    """Whether anybody listens; an agent that was killed leaves its socket. httpx would leave one open that finds nobody.

    Args:
        name: The node.
        deadline: Until when to be patient, by the monotonic clock.

    Raises:
        AgentHangs: Somebody listens, and takes no more connections.
    """
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as attempt:
            attempt.settimeout(max(deadline - time.monotonic(), _AGAIN_S))
            try:
                attempt.connect(str(name.agent_socket))
            except TimeoutError as error:
                raise _hangs(name, error) from error
            except BlockingIOError as error:
                # Those who wait to be accepted fill the queue. With a timeout the kernel says so at once (unix(7), EAGAIN).
                if time.monotonic() >= deadline:
                    raise _hangs(name, error) from error
            except OSError:
                return False
            else:
                return True
        time.sleep(_AGAIN_S)


def _hangs(name: NodeName, error: Exception) -> AgentHangs:
    return AgentHangs(
        f"the agent of node {name} does not answer; nothing was asked of it",
        why=f"{name.agent_socket}: {error or type(error).__name__}",
        remedy="see its log and whether it is stopped; restart it (systemctl restart hookline-agent), or end it: commands work "
        "without it too",
    )


def connect(name: NodeName, *, reading: bool = False) -> RemoteNode | None:
    """The node's agent, if one answers.

    Args:
        name: The node.
        reading: Nothing is to be changed: there is less patience with an agent that is slow.

    Raises:
        AgentHangs: It is there and does not answer.
        AgentError: It answers, and is not one that this process can work with.
    """
    import hookline

    patience_s = _LIVES_S if reading else _LIVES_FOR_CHANGE_S
    deadline = time.monotonic() + patience_s
    if not _is_served(name, deadline):
        return None
    client = httpx.Client(
        transport=httpx.HTTPTransport(uds=str(name.agent_socket)),
        base_url="http://agent",
        timeout=httpx.Timeout(_ANSWER_S, connect=patience_s),
    )
    try:
        health = None
        while health is None:
            try:
                health = client.get("/v1/health", timeout=patience_s).json()
            except httpx.ConnectError as error:
                # The queue is full again, or the agent has ended since.
                if time.monotonic() >= deadline:
                    raise httpx.ConnectTimeout(str(error)) from error
                time.sleep(_AGAIN_S)
                if not _is_served(name, deadline):
                    client.close()
                    return None
    except httpx.TimeoutException as error:
        client.close()
        raise _hangs(name, error) from error
    except (httpx.HTTPError, ValueError) as error:
        client.close()
        raise AgentError(
            f"the agent of node {name} does not answer as one",
            why=f"{name.agent_socket}: {error or type(error).__name__}",
            remedy="see its log, or end it: the command works without it too",
        ) from error
    why = ""
    if health.get("version") != hookline.__version__:
        why = f"it is version {health.get('version')}, and this command {hookline.__version__}"
    elif health.get("state") != str(name.state_dir):
        why = f"it keeps its state in {health.get('state')}, and this command in {name.state_dir}"
    if why:
        client.close()
        raise AgentError(
            f"the agent of node {name} is not this command's",
            why=why,
            remedy="start the agent again with this version and the same HOOKLINE_STATE",
        )
    return RemoteNode(name, client, health)
