"""Maglev consistent hashing: which slot of a service's table belongs to which backend.

Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4. Every
backend has a permutation of the slots that depends on its identity alone, and the backends take turns, each taking
its first free slot. The order of turns is the order of the identities' hashes, never the order in which a user
listed them, so the same backends give the same table on every node and after every restart.

A backend's weight is its quota of slots, exact to one slot (largest remainders); it leaves the turns once it has
them. With equal weights this is the paper's algorithm to the letter: each of N has ⌊M/N⌋ or ⌈M/N⌉ of M slots.

The table is built in the kernel by the program ``build_maglev`` (see ``maglev.h``); :func:`build` is the same in
Python, for planning without a kernel and for the tests to hold the two against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SMALLEST_TABLE = 1_021
LARGEST_TABLE = 65_537
SLOTS_PER_BACKEND = 100


def is_prime(number: int) -> bool:
    """Whether ``number`` is prime, by trial division: fit for table sizes, which stay below 2^17."""
    if number < 4:
        return number > 1
    if number % 2 == 0:
        return False
    return all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))


@lru_cache(maxsize=1024)
def table_size(backends: int) -> int:
    """The table size for a number of backends: the smallest prime that gives each at least 100 slots.

    At least 1,021 and at most 65,537, whatever the number of backends. Evenness and disruption are within one
    percent from a hundred slots each on (the paper's section 5.3).
    """
    size = max(SMALLEST_TABLE, SLOTS_PER_BACKEND * backends)
    while size < LARGEST_TABLE and not is_prime(size):
        size += 1
    return min(size, LARGEST_TABLE)


@dataclass(frozen=True, slots=True)
class Turns:
    """The order of turns and each backend's permutation, everything in the order of turns.

    Attributes:
        order: Positions in the caller's list, shape (n,).
        offset: First slot that each tries, shape (n,), ``uint32``.
        skip: Step from slot to slot, shape (n,), ``uint32``, 1 … size - 1.
        quota: Slots that each gets, shape (n,), ``uint32``; their sum is the table's size.
    """

    order: NDArray[np.int64]
    offset: NDArray[np.uint32]
    skip: NDArray[np.uint32]
    quota: NDArray[np.uint32]


@lru_cache(maxsize=262_144)
def _hashes(identity: bytes) -> bytes:
    return hashlib.blake2b(identity, digest_size=24, person=b"hookline").digest()


def forget_hashes() -> None:
    """Lets go of what is remembered of identities, 12 MiB for 50,000: for a process that seldom builds many tables again."""
    _hashes.cache_clear()


def turns(identities: Sequence[bytes], weights: Sequence[int], size: int) -> Turns:
    """Computes permutations and quotas.

    Args:
        identities: What tells each backend apart, and stays the same as long as it is the same backend.
        weights: Relative weights, each at least 1.
        size: Slots in the table, a prime.

    Raises:
        ValueError: More backends than slots, a size that is not prime, a weight below 1, or an identity twice.
    """
    count = len(identities)
    if not 1 <= count <= size:
        raise ValueError(f"{count} backends do not fit a table of {size} slots")
    if not is_prime(size):
        raise ValueError(f"{size} is not prime: a step could miss slots")
    if len(set(identities)) != count:
        raise ValueError("two backends have the same identity")
    if min(weights) < 1:
        raise ValueError("a weight is below 1")

    raw = np.frombuffer(b"".join(map(_hashes, identities)), dtype="<u8").reshape(count, 3)
    order = np.lexsort((raw[:, 1], raw[:, 0]))
    raw = raw[order]
    return Turns(
        order=order,
        offset=(raw[:, 1] % np.uint64(size)).astype(np.uint32),
        skip=(raw[:, 2] % np.uint64(size - 1) + np.uint64(1)).astype(np.uint32),
        quota=_quotas(np.asarray(weights, dtype=np.int64)[order], size),
    )


def _quotas(weights: NDArray[np.int64], size: int) -> NDArray[np.uint32]:
    """Shares of ``size`` slots: at least one each, proportional, the largest remainders rounded up."""
    total = int(weights.sum())
    shares = weights * size // total
    remainders = weights * size % total
    left = size - int(shares.sum())
    # A stable sort: among equal remainders the order of turns decides, as in the paper's last, partial round.
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    for poor in np.flatnonzero(shares == 0):
        shares[int(np.argmax(shares))] -= 1
        shares[poor] = 1
    return shares.astype(np.uint32)


def build(identities: Sequence[bytes], weights: Sequence[int], size: int) -> NDArray[np.uint32]:
    """The whole table: position in ``identities`` by slot, shape (size,). Slow; see the module's text.

    Raises:
        ValueError: As :func:`turns`.
    """
    plan = turns(identities, weights, size)
    order, skip, quota = plan.order.tolist(), plan.skip.tolist(), plan.quota.tolist()
    slot = plan.offset.tolist()
    table = [-1] * size
    waiting = list(range(len(order)))
    while waiting:
        for turn in waiting:
            here = slot[turn]
            while table[here] >= 0:
                here = (here + skip[turn]) % size
            table[here] = order[turn]
            slot[turn] = (here + skip[turn]) % size
            quota[turn] -= 1
        waiting = [turn for turn in waiting if quota[turn]]
    return np.array(table, dtype=np.uint32)


def violation(slots: NDArray[np.uint32], rows: Sequence[int], weights: Sequence[int]) -> str:
    """What a finished table has that no table may have, empty where it is as it should be.

    It is read from what the table must be, not from how it was built: every slot names one of the backends; nobody else has a
    slot; and a backend of weight w of W in all has its share w/W of the slots, to less than one slot. Where backends are so
    light that their one slot is more than that, the heavy may miss one more slot for each of these.

    Args:
        slots: Row by slot, shape (size,).
        rows: The backends' rows.
        weights: Their weights, each at least 1.
    """
    size, total = len(slots), sum(weights)
    count = np.bincount(slots, minlength=max(rows, default=0) + 1)
    strangers = np.ones(len(count), bool)
    strangers[list(rows)] = False
    foreign = np.flatnonzero(count * strangers)
    if len(foreign):
        return f"{int(count[foreign].sum())} of {size} slots name rows that are not the service's, row {foreign[0]} first"
    light = sum(size * weight < total for weight in weights)
    for row, weight in zip(rows, weights, strict=True):
        surplus = int(count[row]) * total - size * weight
        if not -total * (1 + light) < surplus < total or not count[row]:
            return f"row {row} has {count[row]} of {size} slots, and its weight asks for {size * weight / total:.1f}"
    return ""


def modulo(weights: Sequence[int], limit: int = LARGEST_TABLE) -> NDArray[np.uint32]:
    """The table of plain ``hash % n``: each backend as often as its weight says, in the order given.

    For comparison: one backend more or less moves nearly every connection.

    Raises:
        ValueError: The weights' smallest common form needs more than ``limit`` slots.
    """
    counts = np.asarray(weights, dtype=np.int64)
    counts //= np.gcd.reduce(counts)
    if counts.sum() > limit:
        raise ValueError(f"weights need {counts.sum()} slots, more than {limit}: use rounder ones, or maglev")
    return np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
