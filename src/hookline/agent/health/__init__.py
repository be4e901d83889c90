"""Health checks of backends: what asks them, when, and what follows.

`HealthSupervisor` is all that the daemon needs; `checks` are the questions themselves. What the answers mean for a backend's life
is decided in `hookline.control.health`.
"""

from hookline.agent.health.checks import Backend, Result, check
from hookline.agent.health.supervisor import Counters, HealthSupervisor, Standing

__all__ = ["Backend", "Counters", "HealthSupervisor", "Result", "Standing", "check"]
