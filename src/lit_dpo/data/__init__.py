"""Preference data: sources, formats, encoding, batches. The data module is in `lit_dpo.data.datamodule`."""

from lit_dpo.data.batch import EncodedPair, PairBatch, collate_pairs

__all__ = ["EncodedPair", "PairBatch", "collate_pairs"]
