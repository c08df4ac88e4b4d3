"""Where preferences come from: local files, folders, the Hugging Face hub, or an object that is held."""

from lit_dpo.data.sources.base import Rows, RowSource, Unread
from lit_dpo.data.sources.columns import with_columns
from lit_dpo.data.sources.loading import Source, load_rows

__all__ = ["RowSource", "Rows", "Source", "Unread", "load_rows", "with_columns"]
