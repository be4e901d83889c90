"""Selectors that find pods through an index: what a policy selects costs what it finds, not a look at every pod."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TypeVar

from hookline.model import LabelSelector

K = TypeVar("K")
V = TypeVar("V")

Condition = tuple[str, str, tuple[str, ...]]
SelectorKey = tuple[tuple[tuple[str, str], ...], tuple[Condition, ...]]
"""A selector as plain values: its labels, and its conditions as key, operator and values, all sorted."""

NOBODY: frozenset[str] = frozenset()
EVERYBODY: SelectorKey = ((), ())


def drop(index: dict[K, set[V]], at: K, member: V) -> None:
    """Takes a member out of an index's set, and the set out of the index when it was the last."""
    members = index[at]
    members.discard(member)
    if not members:
        del index[at]


def selector_key(selector: LabelSelector) -> SelectorKey:
    """The same for selectors that mean the same, as far as one sees without thinking."""
    conditions = {
        (expression.key, expression.operator, tuple(sorted(set(expression.values))))
        for expression in selector.match_expressions
    }
    return tuple(sorted(selector.match_labels.items())), tuple(sorted(conditions))


def accepts(key: SelectorKey, labels: Mapping[str, str]) -> bool:
    """Whether labels fulfil a selector."""
    for name, value in key[0]:
        if labels.get(name) != value:
            return False
    for name, operator, values in key[1]:
        # A label is never None, so what is missing is in no values.
        found = labels.get(name)
        if operator == "In":
            fulfilled = found in values
        elif operator == "NotIn":
            fulfilled = found not in values
        else:
            fulfilled = (found is not None) == (operator == "Exists")
        if not fulfilled:
            return False
    return True


@dataclass(slots=True)
class PodIndex:
    """Names of pods by what selectors ask for."""

    pods: set[str] = field(default_factory=set)
    namespaces: dict[str, set[str]] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    _keys: dict[str, set[str]] = field(default_factory=dict)

    def add(self, name: str, namespace: str, labels: Mapping[str, str]) -> None:
        """Adds a pod that is not in it."""
        self.pods.add(name)
        self.namespaces.setdefault(namespace, set()).add(name)
        for pair in labels.items():
            self._pairs.setdefault(pair, set()).add(name)
            self._keys.setdefault(pair[0], set()).add(name)

    def remove(self, name: str, namespace: str, labels: Mapping[str, str]) -> None:
        """Removes a pod, with the labels that it was added with."""
        self.pods.discard(name)
        drop(self.namespaces, namespace, name)
        for pair in labels.items():
            drop(self._pairs, pair, name)
            drop(self._keys, pair[0], name)

    def find(self, key: SelectorKey, within: Set[str] | None = None) -> Set[str]:
        """The pods that a selector takes, of all or of some. The answer may be the index's own set: not to be changed."""
        found: Set[str] | None = within
        for pair in key[0]:
            having: Set[str] = self._pairs.get(pair, NOBODY)
            found = having if found is None else found & having
            if not found:
                return NOBODY
        for name, operator, values in key[1]:
            if found is None:
                found = self.pods
            if operator in ("In", "NotIn"):
                named: set[str] = set()
                for value in values:
                    named |= self._pairs.get((name, value), NOBODY)
            else:
                named = self._keys.get(name, set())
            found = found & named if operator in ("In", "Exists") else found - named
        return self.pods if found is None else found
