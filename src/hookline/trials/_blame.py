"""Which policies stand behind a verdict of the firewall that no rule allowed."""

from __future__ import annotations

from hookline import policy
from hookline.control.verdicts import VerdictEvent

_WITH_PORTS = {6: "TCP", 17: "UDP", 132: "SCTP"}


class Blame:
    """Names the policies that deny, or would; it remembers what it worked out about one world.

    The firewall knows rules that allow, and no policy that does not. So this is worked out of the documents as they are now.
    """

    def __init__(self) -> None:
        self._world: policy.World | None = None
        self._evaluators: dict[bool, policy.Evaluator] = {}

    def policies(self, world: policy.World, event: VerdictEvent) -> tuple[str, ...]:
        """References of the policies that isolate the end that decided; of an audit the audited ones; none for ``allow``."""
        if event.verdict == "allow":
            return ()
        if world is not self._world:
            self._world = world
            self._evaluators = {
                audited: policy.Evaluator(world, audited=audited) for audited in (False, True)
            }
        protocol = _WITH_PORTS.get(event.protocol, event.protocol)
        port = event.destination_port if event.protocol in _WITH_PORTS else 0
        probe = policy.Probe(event.source_address, event.destination_address, protocol, port)
        audited = event.verdict == "audit"
        decision = self._evaluators[audited].decide(probe)
        found = (decision.egress if event.direction == "egress" else decision.ingress).policies
        if not audited:
            return found
        return tuple(one for one in found if one not in self._enforced(probe, event))

    def _enforced(self, probe: policy.Probe, event: VerdictEvent) -> tuple[str, ...]:
        decision = self._evaluators[False].decide(probe)
        return (decision.egress if event.direction == "egress" else decision.ingress).policies
