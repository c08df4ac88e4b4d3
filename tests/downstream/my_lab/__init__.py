"""A project that uses lit_dpo: a policy, a loss, a reference, a format, a metric, a module and a column of its own.

Nothing is registered.
"""

from my_lab.formats import Graded
from my_lab.losses import GradedHingeLoss, TargetHingeLoss
from my_lab.module import WatchedDPO
from my_lab.policy import FrozenA
from my_lab.reference import WeakerReference

__all__ = ["FrozenA", "Graded", "GradedHingeLoss", "TargetHingeLoss", "WatchedDPO", "WeakerReference"]
