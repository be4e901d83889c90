"""The root of every error that Hookline raises on purpose.

Each error owns its presentation: what failed, why, and what to do about it, and the exit status that the
command line ends with. The command line only prints it. Subclasses live beside the code that raises them:

    HooklineError                      exit status 1
    ├── hookline.bpf.BpfError          a bpf(2) or libbpf call failed
    │   ├── ObjectError                an object file that cannot be used
    │   ├── VerifierError              the kernel's verifier refused a program
    │   ├── MapFull                    a map has no room for another entry
    │   ├── LinkChanged                a link holds another program than the expected one
    │   ├── TargetError                a text that names no place to attach to; exit status 2
    │   ├── FeatureMissing             exit status 3
    │   └── NotPermitted               exit status 3
    ├── hookline.model.InvalidResource a document that does not say what it must
    ├── hookline.policy.PolicyError    a question about policies without an answer, or more rules than fit
    ├── hookline.net.NetworkError      a link, route, address or namespace
    ├── hookline.control.ControlError  a change that cannot be planned, applied or adopted
    └── hookline.lab.LabError          a lab that cannot be made, found or removed
"""

from __future__ import annotations

from typing import ClassVar


class HooklineError(Exception):
    """Something failed: what, why, and the remedy, each one or a few plain sentences.

    Args:
        what: What failed, naming the thing it failed for.
        why: The cause, as far as it is known.
        remedy: What the user can do about it, a command where there is one.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.remedy:
            text += f" ({self.remedy})"
        return text

    def as_dict(self) -> dict[str, str]:
        """The error as the ``--json`` form ``{error, why, remedy}``."""
        return {"error": self.what, "why": self.why, "remedy": self.remedy}
