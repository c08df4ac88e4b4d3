"""`lit-dpo generate`: what a policy says, to prompts that are typed, from a file, or in a conversation."""

from lit_dpo.tools.generate.command import main

__all__ = ["main"]
