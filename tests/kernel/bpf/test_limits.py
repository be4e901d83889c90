"""A thousand programs and a map of 16 million entries at once: loaded, their memory told, and gone afterwards."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import descriptors

PROGRAMS = 1_000
ENTRIES = 1 << 24
ONE = """
#include "types.h"
SEC("xdp") int NAME(struct xdp_md *ctx) { return ctx->ingress_ifindex > 7 ? 1 : 2; }
"""
LARGE = """
#include "types.h"
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1 << 24); __type(key, __u32); __type(value, __u64); }
	table SEC(".maps");
SEC("xdp") int NAME(struct xdp_md *ctx)
{
	__u32 key = ctx->ingress_ifindex;
	return bpf_map_lookup_elem(&table, &key) ? 1 : 2;
}
"""


def free_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * PROGRAMS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def vanish(
    listing: Callable[[], Iterator[bpf.ProgramInfo]] | Callable[[], Iterator[bpf.MapDefinition]],
    ids: set[int],
) -> set[int]:
    """Those of the kernel's numbers that are still there after a while: it frees a little later."""
    deadline = time.monotonic() + 10
    while (left := ids & {found.id for found in listing()}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_programs_and_sixteen_million_entries(
    compiled: Callable[..., Path], unique_name: Callable[[], str]
) -> None:
    if free_bytes() < 4 << 30:
        pytest.skip(f"a map of {ENTRIES:,} entries takes up to 2 GiB; {free_bytes() >> 20} MiB are free")
    name = unique_name()
    one = compiled(ONE.replace("NAME", name)).read_bytes()
    large = compiled(LARGE.replace("NAME", f"{name}x")).read_bytes()
    before = descriptors()
    with ExitStack() as stack:
        table_object = stack.enter_context(bpf.Object.open(large, name="large"))
        table = table_object.load().maps["table"]
        loaded = [stack.enter_context(bpf.Object.open(one, name="one")).load() for _ in range(PROGRAMS)]
        ids = {obj.programs[name].id for obj in loaded}
        assert len(ids) == PROGRAMS

        listed = [info for info in bpf.programs() if info.name == name]
        assert {info.id for info in listed} == ids
        total = sum(info.memory_bytes for info in listed)
        assert PROGRAMS * 4096 <= total < PROGRAMS * (1 << 20)
        assert all(obj.programs[name].test_run(bytes(64), ingress="lo").verdict == 2 for obj in loaded[::100])

        # At least the key, the value and a hash bucket's head each.
        assert table.memory_bytes >= ENTRIES * (8 + 8 + 8)
        assert table.max_entries == ENTRIES
        keys = np.arange(1 << 16, dtype="u4") * 251
        table.write(keys, keys.astype("u8") + 1)
        assert table[int(keys[-1])] == int(keys[-1]) + 1
        assert len(table) == len(keys)
        table_id, table_bytes = table.id, table.memory_bytes
        print(f"{PROGRAMS} programs: {total:,} bytes; a map of {ENTRIES:,} entries: {table_bytes:,} bytes")
    assert descriptors() == before
    assert vanish(bpf.programs, ids) == set()
    assert vanish(bpf.maps, {table_id}) == set()
