"""The rows behind every claim: measured here, in one run, beside what they are held against.

`run` measures on one CPU, what is compared in turn, and makes a small lab where a row needs one. Claims in the documentation
quote these rows and the machine that they were measured on. Differences below 15 % between two runs are noise on a shared
machine; `compare` says which are more.
"""

from hookline.bench._compare import NOISE, Change, compare, read
from hookline.bench._groups import GROUPS, Group
from hookline.bench._rows import Row
from hookline.bench._run import Measured, UnknownRow, groups_of, run
from hookline.bench._settings import Settings, choose_cpu

__all__ = [
    "GROUPS",
    "NOISE",
    "Change",
    "Group",
    "Measured",
    "Row",
    "Settings",
    "UnknownRow",
    "choose_cpu",
    "compare",
    "groups_of",
    "read",
    "run",
]
