"""Opens and loads damaged objects, one after the other, in a process of its own: ``python -m tests.kernel.bpf.fuzz``.

A process that libbpf or libelf takes down with it is a failed test, and not the end of the tests. The number of the case
that is being tried lies in a file, so that the case which killed it is known; each case follows from its number alone.

    python -m tests.kernel.bpf.fuzz FIRST COUNT PROGRESS OBJECT…
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import struct
import sys
from collections import Counter
from pathlib import Path

from hookline import bpf

_WARM = 500
# Maps whose sizes were damaged into something larger are opened and not made.
_LARGEST_MAPS = 64 << 20


def damaged(data: bytes, number: int) -> bytes:
    """An object with the damage of a number: cut off, bits flipped anywhere or in its headers, bytes moved."""
    chance = random.Random(number)
    changed = bytearray(data)
    kind = chance.choice(("bits", "bits", "headers", "headers", "tables", "cut", "move", "numbers"))
    table = struct.unpack_from("<Q", data, 40)[0]
    if kind == "cut":
        return bytes(changed[: chance.randrange(len(changed))])
    if kind == "move":
        size = chance.randrange(1, 256)
        source, target = (chance.randrange(len(changed) - size) for _ in range(2))
        changed[target : target + size] = data[source : source + size]
        return bytes(changed)
    low, high = {"headers": (0, 64), "tables": (min(table, len(data) - 1), len(data))}.get(
        kind, (0, len(data))
    )
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(low, high)
        if kind == "numbers":
            place = min(place & ~3, len(data) - 4)
            value = chance.choice(
                (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), chance.getrandbits(32))
            )
            changed[place : place + 4] = struct.pack("<I", value)
        else:
            changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def attempt(data: bytes) -> str:
    """What became of an object: ``loaded``, ``large``, or the name of the error that it was refused with."""
    try:
        with bpf.Object.open(data, name="damaged") as obj:
            wanted = sum(
                (one.definition.key_size + one.definition.value_size) * one.max_entries
                for one in obj.maps.values()
            )
            if wanted > _LARGEST_MAPS:
                return "large"
            obj.load()
            return "loaded"
    except bpf.BpfError as error:
        return type(error).__name__ if str(error) else "an error without words"


def memory_bytes() -> int:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Tries the cases, and prints what came of them."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    objects = [Path(path).read_bytes() for path in sys.argv[4:]]
    with open(sys.argv[3], "r+b") as progress:

        def run(number: int) -> str:
            progress.seek(0)
            progress.write(struct.pack("<Q", number))
            progress.flush()
            return attempt(damaged(objects[number % len(objects)], number))

        # The kernel's own types are read once, for whatever does not fit them, and kept.
        bpf.Btf.vmlinux()
        for number in range(first, first + min(_WARM, count)):
            run(number)
        before = held()
        outcomes = Counter(run(number) for number in range(first, first + count))
        after = held()
    names = ("descriptors", "memory_bytes", "pins")
    grown = {name: new - old for name, old, new in zip(names, before, after, strict=True)}
    print(json.dumps({"outcomes": outcomes, **grown}))


def held() -> tuple[int, int, int]:
    """How many descriptors, bytes of memory and pins there are."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), memory_bytes(), sum(1 for _ in Path("/sys/fs/bpf").rglob("*"))


if __name__ == "__main__":
    main()
