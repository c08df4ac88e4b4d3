"""Preference data: sources, formats, encoding, batches. The data module is in `lit_dpo.data.datamodule`."""

from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate

__all__ = ["CompletionBatch", "EncodedPrompt", "collate"]
