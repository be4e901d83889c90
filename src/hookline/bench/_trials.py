"""How long tables of who may reach whom take with real packets."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hookline import trials
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.errors import HooklineError

TABLES, PODS, PROBES, ROUNDS = 100, 5, 20, 1


def probe_rows(settings: Settings) -> Iterator[Row]:
    """2,000 probes of 100 tables, beside the same ones with the programs left out."""
    with tempfile.TemporaryDirectory(prefix="hookline-bench-") as folder:
        path = Path(folder) / "tables.json"
        items = [_table(number) for number in range(TABLES)]
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

        def timed(*, datapath: bool) -> float:
            name = f"hookline-bench-{secrets.token_hex(3)}"
            start = time.perf_counter()
            rows = trials.run([path], mode="live", datapath=datapath, lab_name=name)
            took = time.perf_counter() - start
            wrong = [one for one in rows if one.mismatch]
            if datapath and wrong:
                raise HooklineError(
                    f"{len(wrong)} of {len(rows)} probes came out otherwise than expected", why=str(wrong[0])
                )
            return took

        with_programs, without = [], []
        rounds = settings.rounds or ROUNDS
        for number in range(
            rounds
        ):  # no round before the first: each makes a lab of its own, and takes a while
            settings.tell("policy-probes", number + 1, rounds)
            with_programs.append(timed(datapath=True))
            without.append(timed(datapath=False))
    yield row(
        "policy-probes",
        "s",
        with_programs,
        reference="the same with the programs left out",
        reference_values=without,
        method=f"{TABLES} tables with a policy and {PODS} pods each, {TABLES * PROBES:,} probes over IPv4 and IPv6, TCP, UDP "
        f"and SCTP, two thirds of them denied; the lab's making and removal included; {settings.where}",
        goal="≤ 60 s for 2,000 live probes",
        most=60.0,
    )


def _table(number: int) -> dict[str, Any]:
    """A table whose last pod may be reached by one of the others, on one port."""
    names = [f"p{which}" for which in range(PODS)]
    target, chosen = names[-1], names[number % (PODS - 1)]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"name": name}}}
        for name in names
    ]
    rule = {"from": [{"podSelector": {"matchLabels": {"name": chosen}}}], "ports": [{"port": 80}]}
    network_policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"only-{chosen}"},
        "spec": {"podSelector": {"matchLabels": {"name": target}}, "ingress": [rule]},
    }
    others = [name for name in names[:-1] if name != chosen]
    return {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "PolicyTest",
        "metadata": {"name": f"table-{number}"},
        "spec": {
            "resources": [*pods, network_policy],
            "probes": [
                {"from": chosen, "to": target, "port": 80, "expect": "allow"},
                {"from": others, "to": target, "port": 80, "expect": "deny"},
                {
                    "from": chosen,
                    "to": target,
                    "port": 81,
                    "protocol": ["TCP", "UDP", "SCTP"],
                    "expect": "deny",
                },
                {"from": target, "to": others, "port": 80, "expect": "allow"},
            ],
        },
    }
