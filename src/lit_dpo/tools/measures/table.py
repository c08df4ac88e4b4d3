"""One pass over the held-out comparisons: what every loss, and everything that arms are compared by, makes of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.losses import PreferenceLoss
    from lit_dpo.module import DPOModule
    from lit_dpo.references import Reference


def pair_table(
    module: DPOModule,
    data: PreferenceDataModule,
    losses: Mapping[str, PreferenceLoss],
    reference: Reference | None = None,
) -> pa.Table:
    """Make a row per held-out comparison, of all validation sets."""
    raise NotImplementedError
