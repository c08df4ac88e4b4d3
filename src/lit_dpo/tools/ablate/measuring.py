"""What is measured of a fitted run: a row for each held-out pair, and completions."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from lit_dpo.errors import AblationError
from lit_dpo.losses import PreferenceLoss
from lit_dpo.tools.measures import judges
from lit_dpo.tools.measures.completions import sampled
from lit_dpo.tools.measures.table import pair_table

if TYPE_CHECKING:
    import pyarrow as pa

    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule
    from lit_dpo.references import Reference


def losses_of(given: Mapping[str, Any]) -> dict[str, PreferenceLoss]:
    """Build losses by name from their configuration, as it is in files."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PreferenceLoss)
    return {name: parser.instantiate_classes(parser.parse_object({"loss": one})).loss for name, one in given.items()}


def judge_of(path: str | None) -> judges.Judge | None:
    """Import who says which of two completions is better: a function, by its path or its name among ours.

    Raises:
        AblationError: if there is none.
    """
    if path is None:
        return None
    try:
        found = pkgutil.resolve_name(path if "." in path else f"{judges.__name__}.{path}")
    except (ImportError, AttributeError, ValueError) as error:
        raise AblationError(f"Expected the import path of a function at `--judge` but got {path!r}: {error}") from error
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise AblationError(f"Expected a function at `--judge` but {path} is a {type(found).__name__}.")
    judge: judges.Judge = found
    return judge


def measure(
    module: DPOModule,
    data: PreferenceDataModule,
    losses: Mapping[str, PreferenceLoss],
    reference: Reference,
    completions: int,
    judge: judges.Judge | None,
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Return the table of pairs, and the completions, of a run that was just fitted."""
    pairs = pair_table(module, data, losses, reference)
    return pairs, sampled(module, data, prompts=completions, judge=judge, reference=reference)
