"""From token ids to sequence log-probs."""

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import PairLogps, SequenceLogps

__all__ = ["Field", "PairLogps", "SequenceLogps"]
