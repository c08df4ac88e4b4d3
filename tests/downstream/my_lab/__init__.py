"""A project that uses lit_dpo: a loss, a metric and a module of its own, nothing registered."""

from my_lab.losses import HingeLoss
from my_lab.module import WatchedDPO

__all__ = ["HingeLoss", "WatchedDPO"]
