"""From the sources of a split to its table, or to its stream: which format reads them, and what is said of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_dpo.data.bad_rows import OnBadRow, check_bad_rows
from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.encoding import encode_table
from lit_dpo.data.formats import Auto, PreferenceFormat
from lit_dpo.data.formats.recognition import (
    HEAD,
    check_unread,
    choice,
    option,
    without_columns,
    written_conversations,
)
from lit_dpo.data.formats.turns import TEMPLATE
from lit_dpo.data.mixture import weighted_sources
from lit_dpo.data.reports import check_budget, report, warn
from lit_dpo.data.sources import RowSource, Source, load_rows, with_columns
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.stream_order import StreamOrder
from lit_dpo.data.streaming import StreamSource, open_stream
from lit_dpo.data.table import PromptTable
from lit_dpo.data.templates import read_template, with_template
from lit_dpo.errors import DataError
from lit_dpo.hub import locate, split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Preparation(NamedTuple):
    """How the rows of any split are read; the options of `PreferenceDataModule` of the same names.

    Attributes:
        format: reads rows.
        comparing: says what is compared.
        encoding: of text files.
        ignore_columns: as if the files did not have them.
        on_bad_row: what happens to rows that cannot be used.
        group_by_prompt: merge rows into examples of so many completions.
        deduplicate: leave out what an earlier row says.
        max_tokens: of a batch.
        of_templates: names of the options of chat templates that are set.
    """

    format: PreferenceFormat
    comparing: Comparing
    encoding: str | None
    ignore_columns: Sequence[str]
    on_bad_row: OnBadRow
    group_by_prompt: int | None
    deduplicate: bool
    max_tokens: int | None
    of_templates: Sequence[str]

    def table(self, split: str, source: Source, encoder: PromptEncoder) -> tuple[PromptTable, NDArray[np.int64]]:
        """Read, check and encode a split, and say what there is to say of it.

        Returns:
            The table, and for each of its rows the number of the part of a mixture that it is from.

        Raises:
            DataError: for whatever is wrong with it.
        """
        sources: list[RowSource] = []
        formats: list[PreferenceFormat] = []
        parts: list[int] = []
        stage = split.partition("/")[0]
        for number, (part, _) in enumerate(weighted_sources(source) or [(source, 1.0)]):
            loaded = load_rows(part, None, stage=stage, encoding=self.encoding, keep_bad=True)
            if not isinstance(part, str | Sequence | Mapping) and not hasattr(part, "num_rows"):
                rank_zero_info(f"{split}: {loaded[0].name} was read to its end, into a table; see `streaming`")
            found = without_columns(loaded, self.ignore_columns)
            format = self._format_of(split, found)
            sources += [with_columns(one, format.columns, (*format.optional_columns, TEMPLATE)) for one in found]
            formats += [format] * len(found)
            parts += [number] * len(found)
        table = encode_table(sources, formats, encoder, self.comparing, self.group_by_prompt, self.deduplicate)
        if said := check_bad_rows(split, table, self.on_bad_row):
            warn(said)
        options = (self.comparing, self.group_by_prompt, self.deduplicate, self.of_templates)
        report(split, table, encoder.truncation, *options)
        check_budget(split, table, self.max_tokens)
        return table, np.repeat(parts, [len(one.rows) for one in table.sources])

    def stream(self, source: Source, encoder: PromptEncoder, shuffle_buffer: int, seed: int) -> PromptStream:
        """Find the training data's sources and their formats, and look at the first rows.

        Raises:
            DataError: for whatever is wrong with these.
        """
        sources: list[StreamSource] = []
        formats: list[PreferenceFormat] = []
        groups: list[list[int]] = []
        parts = weighted_sources(source) or [(source, 1.0)]
        for part, _ in parts:
            found = open_stream(part, encoding=self.encoding)
            heads = [self._head(one) for one in found]
            format = self._format_of("train", found, heads)
            groups.append([*range(len(sources), len(sources) + len(found))])
            columns = format.columns, (*format.optional_columns, TEMPLATE)
            sources += [one.with_columns(*columns, head) for one, head in zip(found, heads, strict=True)]
            formats += [format] * len(found)
        shares = [share for _, share in parts]
        order = StreamOrder(sources, formats, groups, shares, shuffle_buffer, seed)
        rank_zero_info(f"train: {order}")
        return PromptStream(order, encoder, self.comparing, drop_bad_rows=self.on_bad_row == "drop")

    def _head(self, source: StreamSource) -> list[dict[str, Any]]:
        """Return the first rows of a stream that can be read, without the columns that are ignored."""
        rows = source.head(HEAD)
        there = {column for row in rows for column in row}
        if missing := [column for column in self.ignore_columns if column not in there]:
            raise DataError(f"Expected columns of {source.name} in `ignore_columns` but it has no {missing}.")
        return [{name: cell for name, cell in row.items() if name not in self.ignore_columns} for row in rows]

    def _format_of(
        self,
        split: str,
        sources: Sequence[RowSource | StreamSource],
        heads: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> PreferenceFormat:
        """Return the format that reads some files, after a look at what it does not read; of streams in the first rows.

        Args:
            split: of the files.
            sources: of their rows.
            heads: the first rows of each. None: they are asked for.
        """
        heads = [one.head(HEAD) for one in sources] if heads is None else heads
        format = self._named_or_recognised(split, [one.name for one in sources], heads)
        for one, head in zip(sources, heads, strict=True):
            if isinstance(one, RowSource):
                check_unread(one.name, format, one.rows.column_names, one.rows.cells)
            else:
                columns = {column: [row.get(column) for row in head] for row in head for column in row}
                check_unread(one.name, format, columns, columns.__getitem__)
        if written := sorted({column for head in heads for column in written_conversations(format, head)}):
            named = ", ".join(map("`{}`".format, written))
            rank_zero_info(f"{split}: conversations are written as strings in {named}, and read as messages")
        return format

    def _named_or_recognised(
        self, split: str, names: Sequence[str], heads: Sequence[Sequence[Mapping[str, Any]]]
    ) -> PreferenceFormat:
        """Return the format that reads some files, and say which one was recognised."""
        if not isinstance(self.format, Auto):
            return self.format
        formats = [self.format.of(name, head) for name, head in zip(names, heads, strict=True)]
        for name, format in zip(names, formats, strict=True):
            if format != formats[0]:
                raise DataError(
                    f"{split}: Expected files of one layout but {names[0]} is read by `{option(formats[0])}` "
                    f"and {name} by `{option(format)}`."
                )
        if self.format == Auto():
            rank_zero_info(f"{split}: {choice(formats[0], heads[0])}")
        return formats[0]


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, kwargs: Mapping[str, Any], **limits: Any
) -> PromptEncoder:
    """Return the encoder of a tokenizer, with a chat template from a file if there is one.

    Args:
        tokenizer: which is copied to be given another template.
        chat_template: the file.
        kwargs: more arguments for the template.
        limits: as in `PromptEncoder`.

    Raises:
        DataError: for a file that is none, or arguments that the template does not name.
    """
    template = None if chat_template is None else read_template(chat_template)
    encoder = PromptEncoder(
        tokenizer if template is None else with_template(tokenizer, template), chat_template_kwargs=kwargs, **limits
    )
    encoder.check_template()
    return encoder


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by its folder, or by its name on the hub.

    Raises:
        DataError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        folder = locate(*split_revision(name), "data.tokenizer").folder
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a stranger's file meets any line of a library
        raise DataError(f"Expected a tokenizer at `{name}` but it cannot be loaded: {error}") from error
