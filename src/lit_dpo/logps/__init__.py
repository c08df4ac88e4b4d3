"""From token ids to sequence log-probs."""

from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import CompletionLogps, PairLogps, SequenceLogps

__all__ = ["CompletionLogps", "Field", "PairLogps", "SequenceLogps"]
