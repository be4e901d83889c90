"""Which rows there are, what each needs, and who measures it.

A group's rows are measured together. What measures them is imported when it is asked for: a row about importing does not need
the lab's modules, and a list of rows needs none.
"""

from __future__ import annotations

from dataclasses import dataclass


class LeftOutError(Exception):
    """A row cannot be measured here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are measured together.

    Attributes:
        rows: Their ids, and what each measures.
        module: Where the function is that measures them, in this package.
        function: Its name: it takes the settings, and the lab where it needs one.
        lab: Whether it needs a lab.
        privileged: Whether it loads programs.
    """

    rows: dict[str, str]
    module: str
    function: str
    lab: bool = False
    privileged: bool = True


_PATHS = {"local": "a backend on the node", "nat": "a translated one beyond", "dsr": "direct server return"}

_CPUS = {"": "on one CPU", "-unpinned": "not pinned"}
_WAYS = {"service": "a service at connect time", "nftables": "nftables' DNAT", "haproxy": "HAProxy"}

GROUPS = (
    Group({"import-bpf": "importing hookline.bpf"}, "_maps", "import_rows", privileged=False),
    Group({"cli-help": "hookline --help"}, "_control", "start_rows", privileged=False),
    Group({"object-load": "loading five programs, beside bpftool"}, "_maps", "load_rows"),
    Group({"ring-consume": "64-byte events out of a ring, beside a callback for each"}, "_maps", "ring_rows"),
    Group({"percpu-hash-read": "65,536 per-CPU entries read and summed"}, "_maps", "read_rows"),
    Group({"batch-update": "65,536 entries written by batch"}, "_maps", "write_rows"),
    Group({"maglev-build": "a table of 65,537 slots for 1,000 backends"}, "_control", "maglev_rows"),
    Group(
        {"xdp-pass": "a packet of no service, through the balancer"}
        | {
            f"xdp-{kind}-ipv{version}": f"a packet to {text}, IPv{version}"
            for version in (4, 6)
            for kind, text in _PATHS.items()
        },
        "_datapath",
        "rows",
        lab=True,
    ),
    Group(
        {
            "apply-1000x10": "1,000 services of 10 backends, applied",
            "apply-one-of-1000": "one changed backend among them",
        },
        "_control",
        "apply_rows",
        lab=True,
    ),
    Group(
        {"apply-one-of-10000": "one changed backend among 10,000 services"}, "_control", "many_rows", lab=True
    ),
    Group(
        {
            "agent-change": "from a file's change to the kernel, beside 10,000 services",
            "agent-memory": "the agent's memory with 10,000 services of 5 backends",
        },
        "_agent",
        "rows",
        lab=True,
    ),
    Group(
        {
            "policies-1000x1000": "1,000 policies for 1,000 pods, applied",
            "policies-one-label": "one pod's labels among them",
            "policies-first": "the first policy on a node with 100 pods",
        },
        "_policies",
        "apply_rows",
    ),
    Group({"policy-probes": "2,000 live probes of policies"}, "_trials", "probe_rows"),
    Group(
        {
            f"firewall-forward-{number}": f"small packets forwarded under {text}, beside none"
            for number, text in (
                ("1", "one rule"),
                ("100", "100 rules"),
                ("1000", "1,000 rules"),
                ("10000", "10,000 rules"),
                ("many-flows", "1,000 rules in 60,000 flows"),
            )
        }
        | {
            f"nftables-forward-{number}": f"the same by nftables: {text}"
            for number, text in (
                ("1", "one rule"),
                ("100", "100 rules"),
                ("1000", "1,000 rules"),
                ("set-1000", "a set of 1,000"),
                ("tracking", "connection tracking and one rule"),
            )
        },
        "_firewall",
        "forward_rows",
    ),
    Group(
        {"firewall-bulk": "bulk TCP through a node with 1,000 rules, beside none"}, "_firewall", "bulk_rows"
    ),
    Group(
        {
            "firewall-hot": "an established packet of one flow, above an empty program",
            "firewall-cold": "the same with 64,000 flows, one packet each",
        },
        "_firewall",
        "packet_rows",
    ),
    Group(
        {
            f"request-{way}-{percentile}{suffix}": f"a request through {text}, {percentile}, {where}"
            for suffix, where in _CPUS.items()
            for way, text in _WAYS.items()
            for percentile in ("p50", "p99")
        },
        "_sockets",
        "request_rows",
    ),
    Group(
        {
            f"connect-{number}{suffix}": f"connections to {text}, {where}"
            for suffix, where in _CPUS.items()
            for number, text in (
                ("10000", "one of 10,000 services"),
                ("10000-drawn", "10,000 services in turn"),
                ("1", "the only service"),
            )
        },
        "_sockets",
        "connect_rows",
    ),
)
