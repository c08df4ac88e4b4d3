"""Will it fit, and how long will it take: before a weight is downloaded or read."""

from lit_dpo.plan.plan import Plan, plan

__all__ = ["Plan", "plan"]
