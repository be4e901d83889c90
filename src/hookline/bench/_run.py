"""Which rows there are, and measuring them in a lab of their own."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence

from hookline import api
from hookline.bench import _control, _datapath
from hookline.bench._rows import Row
from hookline.errors import HooklineError
from hookline.lab import Lab, LabError
from hookline.sources import files

CLUSTER = """
apiVersion: v1
kind: Node
metadata: {name: node-1}
---
apiVersion: v1
kind: Pod
metadata: {name: pod}
spec: {nodeName: node-1}
---
apiVersion: hookline.dev/v1alpha1
kind: ExternalHost
metadata: {name: server}
spec: {addresses: [203.0.113.2, "2001:db8:203::2"]}
---
apiVersion: hookline.dev/v1alpha1
kind: ExternalHost
metadata: {name: client}
spec: {addresses: [203.0.113.3, "2001:db8:203::3"]}
"""

GROUPS: dict[tuple[str, ...], Callable[[Lab], Iterator[Row]]] = {
    (
        "xdp-pass",
        *(f"xdp-{kind}-ipv{version}" for version in (4, 6) for kind in _datapath.SERVICES),
    ): _datapath.rows,
    ("maglev-build",): _control.maglev_rows,
    ("apply-1000x10", "apply-one-of-1000"): _control.apply_rows,
    ("cli-help",): _control.start_rows,
}
"""What measures which rows: the rows of one group are measured together."""


def run(ids: Sequence[str] = (), *, found: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Measures the rows of these ids, all of them by default.

    Args:
        ids: Which rows.
        found: Told of each row as soon as it is there.

    Raises:
        HooklineError: An id is not known, or the lab cannot be made.
    """
    known = [name for names in GROUPS for name in names]
    for name in ids:
        if name not in known:
            raise HooklineError(f"there is no row {name}", why=f"there are {', '.join(known)}")
    wanted = set(ids or known)
    lab_name = f"bench-{secrets.token_hex(3)}"
    rows = []
    try:
        api.lab_up(files.loads(CLUSTER), lab_name)
        lab = Lab.open(lab_name)
        for names, measure in GROUPS.items():
            if wanted.isdisjoint(names):
                continue
            for row in measure(lab):
                if row.id in wanted:
                    rows.append(row)
                    found(row)
    finally:
        with contextlib.suppress(LabError):  # it was never made, and what prevented it is on its way up
            api.lab_down(lab_name)
    return rows
