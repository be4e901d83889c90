"""The indexes beside the rows of services: the same, whatever order of changes led there."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hookline.control.rows import ServiceRow, ServiceRows
from hookline.datapath.loadbalancer.balancer import pages_for

PAGES = 64


def key(address: int, port: int) -> bytes:
    return bytes(15) + bytes((address,)) + port.to_bytes(2, "big") + bytes((6 if port else 0, 0))


def row(key_of: bytes, pool: int, slots: int) -> ServiceRow:
    """Pools have tables at places of their own; a port 0 is an address's own row."""
    number = key_of[15] * 8 + key_of[17] + 1
    if not key_of[17]:
        return ServiceRow(0, 0, 0, 1, 0, 0, 0, 0)
    return ServiceRow(number, pool * 8 if slots else 0, slots, 0, 0, 0, pool, 0)


CHANGES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 7), st.sampled_from([0, 1021, 5003]))
)


@given(changes=CHANGES, removals=st.sets(st.integers(0, 15)))
def test_indexes_are_what_the_rows_say(changes: list[tuple[int, int, int, int]], removals: set[int]) -> None:
    rows = ServiceRows({}, PAGES)
    sizes: dict[int, int] = {}
    for address, port, pool, slots in changes:
        # All rows of a pool have its one table.
        size = sizes.setdefault(pool, slots)
        rows[key(address, port)] = row(key(address, port), pool, size)
    gone = [one for n, one in enumerate(sorted(rows)) if n in removals]
    before = dict(rows)
    assert rows.take(gone) == [before[one] for one in gone]
    again = ServiceRows(dict(rows), PAGES)
    assert (rows.of_pool, rows.of_address, rows.numbers) == (again.of_pool, again.of_address, again.numbers)
    assert np.array_equal(rows.taken, again.taken)
    assert rows.tables() == again.tables()
    pools = {one.pool for one in rows.values() if one.pool}
    assert rows.of_pool.keys() == pools
    assert rows.tables(pools) == rows.tables()
    assert int(rows.taken.sum()) == sum(rows.tables().values())
    assert rows.tables() == {
        one.table_page: pages_for(one.table_size) for one in rows.values() if one.table_size
    }
