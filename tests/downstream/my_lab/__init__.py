"""A project that uses lit_dpo: a policy, a loss, a metric and a module of its own, nothing registered."""

from my_lab.losses import HingeLoss
from my_lab.module import WatchedDPO
from my_lab.policy import FrozenA

__all__ = ["FrozenA", "HingeLoss", "WatchedDPO"]
