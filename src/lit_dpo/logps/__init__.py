"""From token ids to sequence log-probs."""

from lit_dpo.logps.records import PairLogps, SequenceLogps

__all__ = ["PairLogps", "SequenceLogps"]
