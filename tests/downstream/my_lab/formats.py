from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats import Preference, PreferenceFormat


@dataclass(frozen=True)
class Graded(PreferenceFormat):
    """Rows of three texts; the longer the rejected one, the harder."""

    hardest: float = 3.0

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "chosen", "rejected")

    def read(self, row: Mapping[str, Any]) -> Preference:
        difficulty = min(self.hardest, len(row["rejected"]) / len(row["chosen"]))
        return Preference(row["prompt"], row["chosen"], row["rejected"], {"difficulty": difficulty})
