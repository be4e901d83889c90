"""Every wrong evaluator of `make mutants` can still be made; which of them the tables notice is that command's to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from hookline import trials
from tools import mutants


def test_there_are_many_each_with_a_sentence_of_its_own() -> None:
    assert len(mutants.MUTANTS) >= 40
    assert len({one.says for one in mutants.MUTANTS}) == len(mutants.MUTANTS)
    assert all(one.says.endswith(".") for one in mutants.MUTANTS)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda one: one.says)
def test_what_it_changes_stands_in_the_evaluator_once(mutant: mutants.Mutant) -> None:
    assert mutants.evaluator(mutant) is not None


def test_a_survivor_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One table that asks for one thing: the mutant that it is about dies, another lives, and that is a failure."""
    table = tmp_path / "table.yaml"
    table.write_text(
        """
apiVersion: hookline.dev/v1alpha1
kind: PolicyTest
metadata: {name: t}
spec:
  resources:
    - {apiVersion: v1, kind: Pod, metadata: {name: a}}
    - {apiVersion: v1, kind: Pod, metadata: {name: b}}
    - apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {name: p}
      spec: {ingress: [{ports: [{port: 80, endPort: 90}]}]}
  probes:
    - {from: a, to: b, port: 90, expect: allow}
"""
    )
    steps = trials.read_tables([table])
    ignored, exclusive = (
        next(one for one in mutants.MUTANTS if one.says == says)
        for says in ("endPort is ignored.", "A range begins after its first port.")
    )
    assert mutants.first_mismatch(mutants.evaluator(), steps) is None
    assert "expected allow" in (mutants.first_mismatch(mutants.evaluator(ignored), steps) or "")
    assert mutants.first_mismatch(mutants.evaluator(exclusive), steps) is None
    monkeypatch.setattr(mutants, "TABLES", table)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    assert mutants.main(["endPort is ignored"]) == 0
    assert mutants.main(["A range begins"]) == 1
    assert "SURVIVES  A range begins after its first port." in capsys.readouterr().out
