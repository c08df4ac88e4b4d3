"""`lit-dpo export`: an adapter to hand on, or merged into its base with a certificate, and a model card."""

from lit_dpo.tools.export.command import main

__all__ = ["main"]
