"""Probe pairs: what a merge is certified on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.callbacks.export import data_facts
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import DataError
from lit_dpo.tools.trained import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.data.batch import CompletionBatch

log = logging.getLogger(__name__)

_AT_ONCE = 4  # prompts; padded rows of about one length cost little


class Probe(NamedTuple):
    """Pairs to score.

    Attributes:
        batches: of a few prompts each.
        said: which pairs they are, for the certificate.
        data: counts of the splits that were read; see `data_facts`.
    """

    batches: list[CompletionBatch]
    said: str
    data: dict[str, Any]


def probe(trained: Trained, tokenizer: PreTrainedTokenizerBase, file: str | None, limit: int) -> Probe:
    """Take the first pairs of a file, or of what the run held out, or else of what it trained on.

    Args:
        trained: with the run's configuration, unless there is a file.
        tokenizer: encodes.
        file: any source of pairs. None: the run's.
        limit: most prompts.

    Raises:
        DataError: if there are no pairs to be had.
    """
    if file is not None:
        data = PreferenceDataModule(val=file, tokenizer=tokenizer)
        data.setup("validate")
        name = Path(file).name if Path(file).exists() else file  # cards do not say where on this machine
        return _taken(data, "val", limit, f"first {{count}} prompts of {name}")
    data = _of_run(trained, tokenizer)
    held_out = data.val_split or any(one is not None for name, one in data.sources.items() if name.startswith("val"))
    try:
        data.setup("fit" if data.val_split or not held_out else "validate")
    except DataError as error:
        raise DataError(
            f"The run's data cannot be read ({error}) Start the command where the run was started, or give pairs with "
            "`--probe FILE`."
        ) from error
    if held_out:
        return _taken(data, "val", limit, "first {count} held-out prompts of the run")
    return _taken(data, "train", limit, "first {count} prompts that the run trained on (it held out none)")


def _of_run(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> PreferenceDataModule:
    if trained.config is None:
        raise DataError(
            f"A merge is certified on pairs, and no `config.yaml` of a run is next to {trained.path}, that would say "
            "which: give some with `--probe FILE` (any source that `data.train` reads)."
        )
    from lit_dpo.tools.inspect import InspectCLI

    data = InspectCLI(["--config", str(trained.config)]).datamodule
    if not isinstance(data, PreferenceDataModule):
        raise DataError(f"The run's data are a {type(data).__name__}, not read here: give pairs with `--probe FILE`.")
    data.tokenizer = tokenizer
    if data.streaming and data.sources.get("val") is None:
        raise DataError("The run streamed its data and held out none: give pairs with `--probe FILE`.")
    return data


def _taken(data: PreferenceDataModule, split: str, limit: int, said: str) -> Probe:
    tables = {name: table for name, table in data.tables.items() if name.partition("/")[0] == split and table.size}
    each = -(-limit // max(len(tables), 1))
    batches = [batch for table in tables.values() for batch in _batches(table, each)]
    count = sum(len(batch.prompt_lengths) for batch in batches)
    if not count:
        raise DataError("Expected pairs to certify the merge on but there are none: give some with `--probe FILE`.")
    return Probe(batches, said.replace("{count}", str(count)), data_facts(data))


def _batches(table: Any, limit: int) -> Iterator[CompletionBatch]:
    count = min(table.size, limit)
    for start in range(0, count, _AT_ONCE):
        yield table.batch(list(range(start, min(start + _AT_ONCE, count))))
