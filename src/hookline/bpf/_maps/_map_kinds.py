"""What only some kinds of maps do: queues, stacks, filters, taking an entry out, how full a map is."""

from __future__ import annotations

import errno as errnos
from typing import Any

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, FeatureMissing
from hookline.bpf._maps._map_batch import MapBatches
from hookline.bpf._maps._map_handle import UNSUPPORTED
from hookline.bpf._syscall import Command

__all__ = ["MapKinds"]

_QUEUES = {"queue", "stack"}
_COUNTED = {
    "hash",
    "percpu_hash",
    "lru_hash",
    "lru_percpu_hash",
    "lpm_trie",
    "hash_of_maps",
    "array_of_maps",
    "prog_array",
    "devmap",
    "devmap_hash",
    "cpumap",
    "sockhash",
    "stack_trace",
    "cgroup_storage",
    "percpu_cgroup_storage",
}
_COUNTED_BY_COOKIES = {"sockmap", "reuseport_sockarray"}
_REPLACE_OLDEST = 2  # BPF_EXIST


class MapKinds(MapBatches):
    """Ways to use some kinds of maps."""

    def __contains__(self, key: object) -> bool:
        if self.type != "bloom_filter":
            return super().__contains__(key)
        raw = self._value(key)
        attr = _syscall.attributes("I4xQQQ", self.fd, 0, _syscall.address(raw), 0)
        result = _syscall.call(Command.MAP_LOOKUP_ELEM, attr)
        if result < 0 and result != -errnos.ENOENT:
            raise self._read_failure(-result)
        return result == 0

    def add(self, value: object) -> None:
        """Put a value into a Bloom filter; ``value in map`` is then true, and for a few others by chance."""
        self._require("add to", "bloom_filter")
        self._append(value, 0)

    def push(self, value: object, *, replace_oldest: bool = False) -> None:
        """Put a value into a queue or on a stack.

        Args:
            value: The value.
            replace_oldest: Drop the oldest value where the map is full.

        Raises:
            MapFull: There is no room, and the oldest is to stay.
        """
        self._require("push to", *_QUEUES)
        self._append(value, _REPLACE_OLDEST if replace_oldest else 0)

    def peek(self, default: Any = None) -> Any:
        """The value that `pop` would take, left where it is: a queue's oldest, a stack's newest."""
        self._require("peek into", *_QUEUES)
        found = self._fetch(Command.MAP_LOOKUP_ELEM, b"")
        return default if found is None else found

    def pop(self, *arguments: Any) -> Any:
        """Take an entry out and return its value, in one step that no other can come between.

        Args:
            arguments: Of a queue or stack nothing, or a default for an empty one. Of a hash map the key, and
                perhaps a default for a key that is not there.

        Raises:
            IndexError: The queue or stack is empty and there is no default.
            KeyError: There is no such key and no default.
            FeatureMissing: The map's type cannot do that.
        """
        keyless = self.type in _QUEUES
        if len(arguments) - (0 if keyless else 1) not in (0, 1):
            raise TypeError(
                f"pop() of a {self.type} takes {'' if keyless else 'a key and '}perhaps a default"
            )
        raw = b"" if keyless else self._key(arguments[0])
        try:
            found = self._fetch(Command.MAP_LOOKUP_AND_DELETE_ELEM, raw)
        except BpfError as error:
            if error.errno in UNSUPPORTED or error.errno == errnos.EINVAL:
                raise FeatureMissing(
                    f"read-and-remove in one call for {self.type} maps",
                    errno=error.errno,
                    remedy="read it, then remove it with del",
                ) from None
            raise
        if found is not None:
            return found
        if len(arguments) > (0 if keyless else 1):
            return arguments[-1]
        if keyless:
            raise IndexError(f"{self.type} {self.name!r} is empty")
        raise KeyError(arguments[0])

    @property
    def used(self) -> int | None:
        """How many entries there are, None for kinds that nobody can count.

        The kernel keeps no such number: the keys are read for it, by batch where the type can. LRU maps
        never fill up: they drop old entries from about their size on, and less where CPUs hold back free ones.
        """
        if self.type in ("array", "percpu_array"):
            return self.max_entries
        if self.type in _COUNTED or (self.type in _COUNTED_BY_COOKIES and self._definition.value_size == 8):
            return len(self)
        return None

    @property
    def fullness(self) -> float | None:
        """The share of its entries that are in use, 0 to 1; None where `used` is, or no maximum is set."""
        used = self.used
        return None if used is None or not self.max_entries else used / self.max_entries

    def _append(self, value: object, flags: int) -> None:
        raw = self._value(value)
        attr = _syscall.attributes("I4xQQQ", self.fd, 0, _syscall.address(raw), flags)
        result = _syscall.call(Command.MAP_UPDATE_ELEM, attr)
        if result < 0:
            raise self._write_failure(-result)

    def _require(self, verb: str, *kinds: str) -> None:
        if self.type not in kinds:
            raise BpfError(
                f"cannot {verb} map {self.name!r}",
                why=f"it is a {self.type}, not a {' or '.join(sorted(kinds))}",
                remedy="use what its type has: see help(bpf.Map)",
            )
