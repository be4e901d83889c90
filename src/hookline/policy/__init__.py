"""What network policies mean: pure functions of the documents, with no kernel and no I/O.

`World` is the documents that decide. `evaluate` says whether one connection is allowed and what decided, straight from the
specification's sentences. `Compiler` makes the rows that the kernel's programs look up; it shares no reasoning with
`evaluate`, so each is a check of the other. `impact` compares two worlds. docs/policy.md has the semantics.
"""

from hookline.policy._compiled import Compiled, PolicyRow, RuleSource
from hookline.policy._compiler import Compiler
from hookline.policy._decision import PROTOCOLS, Decision, Direction, Probe, Side
from hookline.policy._errors import PolicyError, TooManyRows
from hookline.policy._evaluate import Evaluator, Match, evaluate, selects
from hookline.policy._impact import Impact, impact
from hookline.policy._numbers import RuleNumbers
from hookline.policy._words import peer_text, port_text, selector_text
from hookline.policy._world import AUDIT_ANNOTATION, World, is_audited

__all__ = [
    "AUDIT_ANNOTATION",
    "PROTOCOLS",
    "Compiled",
    "Compiler",
    "Decision",
    "Direction",
    "Evaluator",
    "Impact",
    "Match",
    "PolicyError",
    "PolicyRow",
    "Probe",
    "RuleNumbers",
    "RuleSource",
    "Side",
    "TooManyRows",
    "World",
    "evaluate",
    "impact",
    "is_audited",
    "peer_text",
    "port_text",
    "selector_text",
    "selects",
]
