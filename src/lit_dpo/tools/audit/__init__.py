"""`lit-dpo audit`: which training pairs are likely labelled the wrong way round, and which teach nothing."""

from lit_dpo.tools.audit.command import main

__all__ = ["main"]
