"""The rows behind every claim: measured here, in one run, beside what they are held against.

`run` makes a small lab, measures, and removes it. Claims in the documentation quote these rows and the machine that they were
measured on. Differences below 15 % between two runs are noise on a shared machine.
"""

from hookline.bench._rows import Row
from hookline.bench._run import GROUPS, run

__all__ = ["GROUPS", "Row", "run"]
