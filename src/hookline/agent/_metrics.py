"""What Prometheus is told: the kernel's counters, read when it asks, and what the agent itself does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from hookline.agent.health import Counters
from hookline.agent.health.supervisor import BUCKETS_SECONDS
from hookline.control import BackendStatus, PoolStatus, RuleCount, Usage
from hookline.datapath.firewall.firewall import Totals as FirewallTotals
from hookline.datapath.loadbalancer.balancer import Totals

CONTENT_TYPE = CONTENT_TYPE_LATEST
BACKENDS_SHOWN_MAX = 10_000
"""Above so many, backends have no series of their own: 50,000 would be 60 MB of text each time."""
RULES_SHOWN_MAX = 10_000
"""As of backends."""
_DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Look:
    """One look at the kernel."""

    totals: Totals | None = None
    pools: list[PoolStatus] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)
    firewall: FirewallTotals | None = None
    rules: list[RuleCount] = field(default_factory=list)
    health: Counters | None = None
    health_states: dict[str, int] = field(default_factory=dict)


class Metrics:
    """The agent's own counters, and the names of all."""

    def __init__(self, node: str, version: str) -> None:
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        info = Gauge("hookline_agent_info", "The agent's version.", ["node", "version"], registry=self._own)
        info.labels(node, version).set(1)
        self.changes = Counter(
            "hookline_agent_changes",
            "Changes to the wanted state, by what asked for them and how they ended.",
            ["source", "result"],
            registry=self._own,
        )
        self.change_seconds = Histogram(
            "hookline_agent_change_duration_seconds",
            "From the moment that the agent knows of a change until the kernel has it.",
            ["source"],
            buckets=_DURATIONS,
            registry=self._own,
        )
        self.checks = Counter(
            "hookline_agent_checks",
            "Looks at the kernel for what somebody else changed.",
            ["result"],
            registry=self._own,
        )
        self.check_seconds = Histogram(
            "hookline_agent_check_duration_seconds",
            "How long such a look took, the repair included.",
            buckets=_DURATIONS,
            registry=self._own,
        )
        self.repairs = Counter(
            "hookline_agent_repairs",
            "What was not as it was left, and was mended.",
            ["kind"],
            registry=self._own,
        )
        self.problems = Gauge(
            "hookline_agent_problems",
            "What is wrong now: files that are refused, folders that are lost, and what a check found and cannot mend.",
            ["kind"],
            registry=self._own,
        )
        self.faults = Counter(
            "hookline_agent_faults",
            "Errors that nobody expected, by the part of the agent that they happened in; the log has their tracebacks.",
            ["part"],
            registry=self._own,
        )
        self.look_age = Gauge(
            "hookline_agent_look_age_seconds",
            "How old the kernel's counters here are: they are read beside changes, which go first; +Inf: not read yet.",
            registry=self._own,
        )
        self.extra: list[CollectorRegistry] = [self._own]

    def kernel_text(self, look: Look) -> bytes:
        """The exposition of what the kernel counts."""
        kernel = CollectorRegistry(auto_describe=False)
        kernel.register(_Kernel(look))
        return generate_latest(kernel)

    def own_text(self, look_at: float) -> bytes:
        """The exposition of the agent's own counters.

        Args:
            look_at: When the last look at the kernel began, by the monotonic clock.
        """
        self.look_age.set(time.monotonic() - look_at)
        return b"".join(generate_latest(registry) for registry in self.extra)


class _Kernel:
    """A look as metric families."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if self._look.totals is not None:
            yield from _totals(self._look.totals)
        yield from _services(self._look.pools)
        number = sum(len(status.backends) for status in self._look.pools)
        left_out = number if number > BACKENDS_SHOWN_MAX else 0
        yield GaugeMetricFamily(
            "hookline_backends_left_out",
            "Backends without series of their own, since there are too many.",
            left_out,
        )
        if not left_out:
            yield from _backends(self._look.pools)
        if self._look.firewall is not None:
            yield from _firewall(self._look.firewall, self._look.rules)
        yield from _usage(self._look.usage)
        if self._look.health is not None:
            yield from _health(self._look.health, self._look.health_states)


def _totals(totals: Totals) -> Iterator[Metric]:
    for name, text, counts, label in (
        ("hookline_verdict", "by verdict of the XDP balancer", totals.verdicts, "verdict"),
        ("hookline_refused", "that were refused, by reason", totals.reasons, "reason"),
    ):
        packets = CounterMetricFamily(f"{name}_packets", f"Packets {text}.", labels=[label])
        octets = CounterMetricFamily(f"{name}_bytes", f"Bytes {text}.", labels=[label])
        for key, pair in counts.items():
            packets.add_metric([key], pair[0])
            octets.add_metric([key], pair[1])
        yield packets
        yield octets
    for name, text, pair in (
        ("hookline_reply", "of replies that were given the service's address", totals.replies),
        ("hookline_handed_to_stack", "that were left to the stack", totals.handed_to_stack),
    ):
        yield CounterMetricFamily(f"{name}_packets", f"Packets {text}.", value=pair[0])
        yield CounterMetricFamily(f"{name}_bytes", f"Bytes {text}.", value=pair[1])
    exceptions = CounterMetricFamily(
        "hookline_exceptions",
        "What the kernel could not do for the XDP balancer, by verdict.",
        labels=["verdict"],
    )
    for key, count in totals.exceptions.items():
        exceptions.add_metric([key], count)
    yield exceptions
    sockets = CounterMetricFamily(
        "hookline_sockets",
        "Sockets of this node that asked for a service, by what became of them.",
        labels=["outcome"],
    )
    for key, count in totals.sockets.items():
        sockets.add_metric([key], count)
    yield sockets


_POOL = ["service", "port", "protocol", "family", "scope"]


def _pool_labels(status: PoolStatus) -> list[str]:
    pool = status.pool
    return [pool.service, pool.port, pool.protocol, f"IPv{pool.version}", pool.frontends[0].scope]


def _services(pools: list[PoolStatus]) -> Iterator[Metric]:
    for name, text, member in (
        ("connections", "Connections", "connections"),
        ("packets", "Packets", "packets"),
        ("bytes", "Bytes", "bytes"),
        ("dropped_packets", "Packets that were dropped, for want of a backend for example,", "drops"),
    ):
        family = CounterMetricFamily(
            f"hookline_service_{name}", f"{text} of one port of a service.", labels=_POOL
        )
        for status in pools:
            family.add_metric(_pool_labels(status), getattr(status, member))
        yield family
    states = GaugeMetricFamily(
        "hookline_service_backends", "Backends of one port of a service, by state.", labels=[*_POOL, "state"]
    )
    for status in pools:
        counts: dict[str, int] = {}
        for backend in status.backends:
            state: str = "unreachable" if backend.placement.how == "unreachable" else backend.target.state
            counts[state] = counts.get(state, 0) + 1
        for state, count in counts.items():
            states.add_metric([*_pool_labels(status), state], count)
    yield states


def _backends(pools: list[PoolStatus]) -> Iterator[Metric]:
    labels = [*_POOL, "backend", "address"]
    named = [
        ([*_pool_labels(status), one.target.name, _address(one)], one)
        for status in pools
        for one in status.backends
    ]
    for name, text in (
        ("connections", "Connections given to a backend"),
        ("packets", "Packets to a backend"),
        ("bytes", "Bytes to a backend"),
        ("reply_packets", "Packets from a backend"),
        ("reply_bytes", "Bytes from a backend"),
    ):
        family = CounterMetricFamily(f"hookline_backend_{name}", f"{text}.", labels=labels)
        for values, backend in named:
            family.add_metric(values, getattr(backend, name))
        yield family
    slots = GaugeMetricFamily("hookline_backend_slots", "Slots of the service's table.", labels=labels)
    for values, backend in named:
        slots.add_metric(values, backend.slots)
    yield slots


def _address(backend: BackendStatus) -> str:
    target = backend.target
    return (
        f"[{target.address}]:{target.port}"
        if target.address.version == 6
        else f"{target.address}:{target.port}"
    )


def _firewall(totals: FirewallTotals, rules: list[RuleCount]) -> Iterator[Metric]:
    labels = ["direction", "verdict", "reason"]
    packets = CounterMetricFamily(
        "hookline_policy_packets", "Packets that the firewall judged.", labels=labels
    )
    octets = CounterMetricFamily("hookline_policy_bytes", "Bytes that the firewall judged.", labels=labels)
    for (direction, reason), pair in totals.reasons.items():
        key = [direction, "drop" if reason in totals.drops else "pass", reason]
        packets.add_metric(key, pair[0])
        octets.add_metric(key, pair[1])
    yield packets
    yield octets
    left_out = len(rules) if len(rules) > RULES_SHOWN_MAX else 0
    yield GaugeMetricFamily(
        "hookline_policy_rules_left_out",
        "Rules of policies without series of their own, since there are too many.",
        left_out,
    )
    for name, text in (("packets", "Packets"), ("bytes", "Bytes")):
        family = CounterMetricFamily(
            f"hookline_policy_rule_{name}",
            f"{text} that a rule of a policy let through.",
            labels=["policy", "direction", "rule"],
        )
        for one in () if left_out else rules:
            family.add_metric([one.policy, one.direction, str(one.rule)], getattr(one, name))
        yield family
    for name, text, number in (
        ("lost", "that found no room in the ring", totals.lost),
        ("suppressed", "that were not told, since there were too many", totals.suppressed),
    ):
        yield CounterMetricFamily(f"hookline_policy_verdicts_{name}", f"Verdicts {text}.", value=number)


def _usage(usage: dict[str, Usage]) -> Iterator[Metric]:
    used = GaugeMetricFamily("hookline_map_entries", "Entries in use of a map.", labels=["map"])
    size = GaugeMetricFamily("hookline_map_max_entries", "Entries that a map has room for.", labels=["map"])
    for name, one in usage.items():
        used.add_metric([name], one.used)
        size.add_metric([name], one.size)
    yield used
    yield size


def _health(counters: Counters, states: dict[str, int]) -> Iterator[Metric]:
    results = CounterMetricFamily(
        "hookline_health_checks", "Health checks, by how they ended.", labels=["type", "outcome", "reason"]
    )
    for key, count in counters.results.items():
        results.add_metric(list(key), count)
    yield results
    durations = HistogramMetricFamily(
        "hookline_health_check_duration_seconds", "How long health checks took.", labels=["type"]
    )
    for kind, numbers in counters.durations.items():
        total, buckets = 0, []
        for limit, count in zip((*map(str, BUCKETS_SECONDS), "+Inf"), numbers, strict=True):
            total += count
            buckets.append((limit, total))
        durations.add_metric([kind], buckets, sum_value=counters.seconds.get(kind, 0.0))
    yield durations
    transitions = CounterMetricFamily(
        "hookline_health_transitions", "Changes of backends' states.", labels=["before", "after"]
    )
    for (before, after), count in counters.transitions.items():
        transitions.add_metric([before, after], count)
    yield transitions
    late = CounterMetricFamily(
        "hookline_health_late_checks", "Health checks that had to wait for a place.", labels=["lane"]
    )
    for lane, count in counters.late.items():
        late.add_metric([lane], count)
    yield late
    watched = GaugeMetricFamily(
        "hookline_health_backends", "Backends that are watched, by state.", labels=["state"]
    )
    for state, count in states.items():
        watched.add_metric([state], count)
    yield watched
