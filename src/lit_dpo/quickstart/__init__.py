"""The built-in model and data `lit-dpo/quickstart`, made on this machine at first use."""

from lit_dpo.quickstart.model import quickstart_directory, quickstart_tokenizer
from lit_dpo.quickstart.text import Style, is_correct, style

__all__ = ["Style", "is_correct", "quickstart_directory", "quickstart_tokenizer", "style"]
