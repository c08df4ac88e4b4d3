"""The Lightning data module for preferences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_dpo.data.bad_rows import OnBadRow
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.batching import Batching
from lit_dpo.data.comparisons import Choice, Comparing, Ties
from lit_dpo.data.doctor import remembered
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.formats import Auto, Preference, PreferenceFormat, Ranking
from lit_dpo.data.loader import PromptDataset, PromptLoader, TrainLoader, loader_options
from lit_dpo.data.mixture import Mixture, names, weighted_sources
from lit_dpo.data.position import first_position, position
from lit_dpo.data.preparing import Preparation, load_tokenizer, make_encoder
from lit_dpo.data.reports import Ask, warn
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.data.sources import Source
from lit_dpo.data.splits import Making, Splits, by_name
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.stream_loader import StepLimits, StreamLoader
from lit_dpo.data.streaming import SHUFFLE_BUFFER, check_streaming
from lit_dpo.data.table import PromptTable
from lit_dpo.data.truncation import Truncation, check_limits
from lit_dpo.errors import DataError, ResumeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.policy import LoRAPolicy

    Tokenizer: TypeAlias = str | PreTrainedTokenizerBase
else:  # what a command line can say
    Tokenizer: TypeAlias = str

_BATCH_SIZE = 8


class PreferenceDataModule(LightningDataModule):
    """Preference pairs, and rankings of many completions, from files, the hub or `datasets`, encoded and batched.

    Everything that can be wrong with the data is found in `prepare_data`, before weights are loaded or a run directory
    is made: every row is read, checked and encoded there, once; the result is cached by content.

    Args:
        train: training pairs: a `.jsonl`, `.json`, `.csv`, `.tsv` (each also with `.gz`, `.zst`, `.bz2` or `.xz`),
            `.parquet` or `.arrow` file, a pattern, a list of them, a folder that `datasets` has saved, a hub data set
            as `organisation/name:split`, `lit-dpo/quickstart`; a `datasets.Dataset`, `DatasetDict` or
            `IterableDataset`, or rows, such as a list of dictionaries. Or a mixture: several of these with the share of
            the prompts that each shall have, `{"a.jsonl": 0.7, "organisation/name:train": 0.3}`, or a list of pairs
            `(source, share)`. Shares hold at every point of an epoch, to within one prompt of each source, whatever
            the batches and ranks are. An epoch shows every row at least once, and those of smaller sources again, in
            fresh permutations. Each source is recognised for itself.
        val: validation pairs, likewise, or several sets of them by name, which are then measured one by one as
            `val/NAME/…` and together as `val/…`. None: see `val_split`.
        test: test pairs, likewise.
        predict: pairs for `predict`, likewise. None: those of `test`, or else of `val`.
        format: how a row becomes a preference, or a ranking of many completions: which columns, for instance. `Auto`:
            the one of the known layouts that a file's columns and first rows have.
        tokenizer: a folder, or `organisation/name` or `organisation/name@revision` of the hub; or one of transformers'
            tokenizers. None: the tokenizer of the module's policy.
        max_length: most tokens of a prompt and one completion together. None: no limit.
        max_prompt_length: most tokens of a prompt. None: no limit of its own.
        truncation: what happens to longer ones: `drop`, `truncate_prompt`, `truncate_completion`, `truncate_both` or
            `error`.
        comparisons: which completions of a row with scores or ranks are compared: `all`, each two; `best_worst`, one
            comparison; `best_rest`, the best with each other one; `adjacent`, each with the next one.
        ties: what happens to completions of equal score or rank: `drop`, they are not compared; `half`, they are, with
            1/2 in the column `probability`, which is 1 for all others: `SoftDPOLoss` reads it.
        group_by_prompt: merge rows of the same prompt, so that its tokens are computed once, into examples of up to so
            many different completions; further ones go into a further example. Each comparison stays, with its columns.
            None: a row is an example.
        deduplicate: leave out rows that say what an earlier row of the split says: the same prompt, completions,
            comparisons and numbers, to the token.
        batch_size: prompts (with two completions each: pairs) per device and batch, or with `max_tokens` the most of
            them. None: 8, or with `max_tokens` as many as fit.
        eval_batch_size: the same outside of training. None: `batch_size`.
        max_tokens: most tokens of a batch per device (each prompt once, and all its completions), in training and
            outside. Batches then hold as many prompts as fit; a step is still the mean over its comparisons. None:
            batches are counted in prompts.
        val_split: without `val`, this fraction of the training prompts is held out for validation, with all their
            completions. 0: no validation.
        num_workers: processes that collate batches. Encoding is done by then, and collating takes some milliseconds,
            about what a process takes to hand a batch over: 0 is rarely slow. With `streaming` they encode, too.
        streaming: read, check and encode the training rows as training goes, for data that are larger than the disk or
            have no end: files with a row a line (`.jsonl`, `.csv`, also `.gz`) or `.parquet`, hub data sets,
            `IterableDataset`, any iterable that can begin anew, or a function that makes an iterator. Every process
            reads all rows, and parses and tokenises its own. What needs their number is refused or says so: give
            `max_steps` for a learning rate that falls, and `val` for validation. False: rows are a table; an iterable
            is read to its end first.
        shuffle_buffer: of a stream, rows that are shuffled together: blocks of so many follow one another. None: 10000.
        seed: of the order of training and of `val_split`.
        chat_template_kwargs: more arguments for the chat template; those that it does not name are refused. A row has
            its own in a column of this name.
        chat_template: a file that holds the chat template, in Jinja, by which conversations are trained and which is
            exported with the adapter. None: the tokenizer's own.
        ignore_columns: columns that are left out, as if the files did not have them. What looks like a part of the
            prompt or like a label is refused otherwise, if the format does not read it.
        on_bad_row: what happens to rows that cannot be used (broken JSON, a missing completion, with `truncation=error`
            one that is too long): `error`, all of them are reported by what is wrong, and nothing is loaded; `drop`,
            they are reported and left out. A file without any other row is an error.
        encoding: of text files that are neither UTF-8, nor UTF-16 or UTF-32 whose first bytes say so: `cp1252`.

    Example:
        >>> from lit_dpo.data.datamodule import PreferenceDataModule
        >>> from lit_dpo.data.formats import Triples
        >>> data = PreferenceDataModule(train="pairs.jsonl", val_split=0.1, format=Triples(prompt="request"))
    """

    def __init__(
        self,
        train: Source | dict[str, float] | None = None,
        val: Source | dict[str, Source] | None = None,
        test: Source | dict[str, Source] | None = None,
        predict: Source | None = None,
        format: PreferenceFormat = Auto(),  # noqa: B008 - frozen
        tokenizer: Tokenizer | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        truncation: Truncation = "drop",
        comparisons: Choice = "all",
        ties: Ties = "drop",
        group_by_prompt: int | None = None,
        deduplicate: bool = False,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        max_tokens: int | None = None,
        val_split: float = 0.0,
        num_workers: int = 0,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        ignore_columns: list[str] | None = None,
        on_bad_row: OnBadRow = "error",
        encoding: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_split < 1:
            raise ValueError(f"Expected `val_split` in [0, 1) but got {val_split}.")
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_tokens": max_tokens}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"Expected `{name}` >= 1 but got {size}.")
        if num_workers < 0 or seed < 0:
            raise ValueError(f"Expected `num_workers` and `seed` >= 0 but got {num_workers} and {seed}.")
        if group_by_prompt is not None and group_by_prompt < 2:
            raise ValueError(f"Expected `group_by_prompt` >= 2 (a pair has two completions) but got {group_by_prompt}.")
        check_limits(max_length, max_prompt_length, truncation)
        if on_bad_row not in get_args(OnBadRow):
            raise ValueError(f"Expected `on_bad_row` as `error` or `drop` but got {on_bad_row!r}.")
        mixed = weighted_sources(train)
        if mixed and group_by_prompt is not None:
            raise ValueError("Expected no `group_by_prompt` with a mixture: an example could be of several sources.")
        check_streaming(
            streaming, shuffle_buffer, val_split=val_split, group_by_prompt=group_by_prompt, deduplicate=deduplicate
        )
        if weighted_sources(predict) is not None:
            raise DataError("Expected no weights for `predict`: a mixture is for `train` alone.")
        self.sources = {"train": train, **by_name("val", val), **by_name("test", test), "predict": predict}
        self.format = format
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        self.comparing = Comparing(comparisons, ties)
        self.group_by_prompt = group_by_prompt
        self.deduplicate = deduplicate
        self.batch_size = _BATCH_SIZE if batch_size is None and max_tokens is None else batch_size
        self.eval_batch_size = eval_batch_size or self.batch_size
        self.max_tokens = max_tokens
        self.val_split = val_split
        self.num_workers = num_workers
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer or SHUFFLE_BUFFER
        self.seed = seed
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.chat_template = chat_template
        self.ignore_columns = ignore_columns or []
        self.on_bad_row: OnBadRow = on_bad_row
        self.encoding = encoding
        self._splits = Splits(self.sources)
        self._shares = [share for _, share in mixed or ()]
        self._encoder: PromptEncoder | None = None
        self._policy: Any = None  # that the encoder is of
        self._train_loader: TrainLoader | None = None
        self._resume: Mapping[str, Any] | None = None

    # --- Lightning's hooks -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Load, check and encode what the run needs, on one process, which leaves it in the cache for the others.

        Raises:
            DataError: for whatever is wrong with the data, with file and row.
        """
        stage = str(self.trainer.state.fn.value) if self.trainer and self.trainer.state.fn else "fit"
        self.setup(stage)
        if stage == "fit" and self._stream is None:
            for line in remembered(self._table("train"), self.loaded_tokenizer):
                warn(f"train: {line}")

    def setup(self, stage: str) -> None:
        """Have the tables of a stage (`fit`, `validate`, `test` or `predict`)."""
        self._follow_policy()
        buffer = self.shuffle_buffer if self.streaming else None
        if any(split not in self._tables for split in self._splits.of_stage(stage)):
            making = Making(self._preparation, self._get_encoder(), self.val_split, self.seed, buffer)
            self._splits.make(stage, making)
        if stage in ("validate", "test"):
            for split in self._splits.of_stage(stage):
                self._table(split)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches, from the position of the checkpoint if one is resumed."""
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        options, batching = self._loader_options(), self._batching(self.batch_size)
        if self._stream is not None:
            self._stream.order.shuffle = shuffle
            limits = StepLimits(batching.ranks, self.batch_size, self.max_tokens)
            self._train_loader = StreamLoader(self._stream, limits, batching.rank, **options)
        else:
            table = self._table("train")
            sampler = self._sampler(table, self.batch_size, shuffle=shuffle)
            self._train_loader = PromptLoader(self._dataset(table, "training_step"), sampler=sampler, **options)
        if trainer := self.trainer:
            self._train_loader.start = self._first_position
            self._train_loader.fetches_ahead = lambda: math.isinf(trainer.num_training_batches)
        return self._train_loader

    def val_dataloader(self) -> Any:
        """Batches in file order, by name if there are several sets; no loader if there are no validation data."""
        if all(self._tables.get(split) is None for split in self._splits.sets("val")):
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # on purpose
            return []
        return self._eval_loaders("val")

    def test_dataloader(self) -> DataLoader[CompletionBatch] | dict[str, DataLoader[CompletionBatch]]:
        """Batches in file order, by name if there are several sets."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> DataLoader[CompletionBatch]:
        """Batches in file order."""
        return self._eval_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: the epoch, its consumed batches, and what these counts depend on."""
        loader = self._train_loader
        if self.trainer is None or loader is None:
            return {}
        return position(self.trainer, loader, self._resume) | self._order_facts()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training there; evaluation does not care.

        `ExactResume` adds what Lightning's loops do not tell: that it stands `between` two epochs, or that one is
        `finished` but for its end.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._resume = state_dict

    @property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that encodes the data; what is exported with an adapter."""
        return self._get_encoder().tokenizer

    @property
    def train_digest(self) -> str | None:
        """Of the training data as they are encoded, by which a run that goes on knows them; None before `setup`.

        Of a stream it is of the first rows.
        """
        table = self._stream or self._tables.get("train")
        if table is None or not self._shares:
            return None if table is None else table.digest
        return f"{table.digest} {self._shares}"

    @property
    def tables(self) -> dict[str, PromptTable]:
        """What is encoded by now, by split: `train`, `val` or `val/NAME`, and so on."""
        return self._splits.made

    @property
    def columns(self) -> dict[str, frozenset[str]]:
        """By split of this run, the names of the numbers that its rows bring, which travel as `columns`."""
        return {split: frozenset(rows.columns) for split, rows in self._splits.all.items()}

    def check_tokens(self, vocabulary: int, context: int | None, made_for: int | None, model: str) -> None:
        """See that a model can read all of this run; say once if some are longer than what it was made for.

        Raises:
            DataError: for the first comparison that it cannot, with file and row.
        """
        self._splits.check_tokens(vocabulary, context, made_for, model)

    def check_lists(self, ask: Ask) -> None:
        """Let a loss over lists see what is compared, before a model is there.

        Args:
            ask: given `completions_per_prompt`, `comparisons` and `comparisons_per_prompt` of some prompts, raises a
                `ValueError` for those that it cannot use.

        Raises:
            DataError: for the first prompt that it refuses, with file and row.
        """
        self._splits.check_lists(ask)

    # --- for reports -----------------------------------------------------------------------------------------------

    def preference(self, split: str, row: int) -> Preference | Ranking:
        """Return the raw prompt and completions of a row of a split, by its number in `batch.indices`.

        Splits are `train`, `val`, …, and `val/NAME` where there are several.
        """
        return self._splits.rows(split).preference(row)

    def place(self, split: str, row: int) -> str:
        """Say in which file a row of a split is, and its number there."""
        return self._splits.rows(split).place(row)

    def prompts(self, split: str, limit: int) -> list[tuple[int, list[int], Preference | Ranking]]:
        """Return the first `limit` prompts of a split: row number, token ids as trained on, what the row says.

        Of several sets, equally many each.
        """
        sets = self._splits.sets(split)
        if sets != [split]:
            return [one for name in sets for one in self.prompts(name, -(-limit // len(sets)))][:limit]
        return self._splits.rows(split).prompts(limit)

    # --- tables ----------------------------------------------------------------------------------------------------

    @property
    def _tables(self) -> dict[str, PromptTable | None]:
        return self._splits.tables

    @property
    def _stream(self) -> PromptStream | None:
        return self._splits.stream

    def _table(self, split: str) -> PromptTable:
        return self._splits.table(split)

    @property
    def _preparation(self) -> Preparation:
        templates = {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}
        return Preparation(
            self.format,
            self.comparing,
            self.encoding,
            self.ignore_columns,
            self.on_bad_row,
            self.group_by_prompt,
            self.deduplicate,
            self.max_tokens,
            [name for name, value in templates.items() if value],
        )

    def _get_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._policy = self._policy_now
            self._encoder = self._make_encoder()
        return self._encoder

    def _make_encoder(self) -> PromptEncoder:
        limits = {name: getattr(self, name) for name in ("max_length", "max_prompt_length", "truncation")}
        return make_encoder(self._load_tokenizer(), self.chat_template, self.chat_template_kwargs, **limits)

    @property
    def _policy_now(self) -> LoRAPolicy | None:
        """The policy whose tokenizer encodes, if it is a policy's."""
        return (
            None
            if self.tokenizer is not None
            else getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        )

    def _follow_policy(self) -> None:
        """Encode for the policy that is trained now: the module may have been used with another one before."""
        policy = self._policy_now
        if self._encoder is None or policy is None or policy == self._policy:
            return
        before, self._encoder, self._policy = self._encoder, self._make_encoder(), policy
        if self._encoder.fingerprint != before.fingerprint:
            self._splits.forget()

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            policy = self._policy_now
            if policy is None:
                raise DataError("Expected `tokenizer` to be set, because there is no module whose policy has one.")
            return policy.load_tokenizer()
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer

    # --- loaders ---------------------------------------------------------------------------------------------------

    def _batching(self, batch_size: int | None) -> Batching:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batching(batch_size, self.max_tokens, self.seed, rank, ranks)

    def _sampler(self, table: PromptTable, batch_size: int | None, *, shuffle: bool) -> PromptSampler:
        batching = self._batching(batch_size)
        mixture = self._mixture(table, batching.multiple) if shuffle and self._shares else None
        return batching.sampler(table, shuffle=shuffle, mixture=mixture)

    def _mixture(self, table: PromptTable, multiple: int) -> Mixture:
        """Return the order of the training data's sources, and say what an epoch is."""
        mixture = Mixture(self._splits.parts[table.rows], self._shares, multiple, names(self.sources["train"]))
        rank_zero_info(f"train: {mixture}")
        return mixture

    def _dataset(self, table: PromptTable, step: str | None) -> PromptDataset:
        """For a step of the module; one of one's own, which may take means, gets no batch without comparisons."""
        if step is None:  # nothing is predicted twice
            return PromptDataset(table)
        of = getattr(type(self.trainer and self.trainer.lightning_module), step, None)
        return PromptDataset(table, counts_all=not getattr(of, "__module__", "").startswith("lit_dpo."))

    def _loader_options(self) -> dict[str, Any]:
        """Pinned for the trainer's device, not for one that happens to be there: pinning opens a context on it."""
        device = self.trainer.strategy.root_device.type if self.trainer else "cpu"
        return loader_options(self.num_workers, pin_memory=device == "cuda")

    def _first_position(self) -> tuple[int, int]:
        state, self._resume = self._resume, None
        assert self.trainer is not None
        assert self._train_loader is not None
        if state is not None and isinstance(self._train_loader, StreamLoader):
            if not self.trainer.optimizers:
                raise ResumeError(
                    "The stream was read while the optimizer was made, before it is known where the run goes on: use "
                    "`trainer.max_steps` there instead of `trainer.estimated_stepping_batches`."
                )
            self._train_loader.starts = {**state.get("starts", {})}
        return first_position(state, self.trainer, self._train_loader, self._order_facts())

    def _order_facts(self) -> dict[str, Any]:
        rows = self._stream if self._stream is not None else self._table("train")
        return self._batching(self.batch_size).facts(rows, self._shares)

    def _eval_loaders(self, split: str) -> DataLoader[CompletionBatch] | dict[str, DataLoader[CompletionBatch]]:
        sets = self._splits.sets(split)
        if sets == [split]:
            return self._eval_loader(split)
        return {name.partition("/")[2]: self._eval_loader(name) for name in sets}

    def _eval_loader(self, split: str) -> DataLoader[CompletionBatch]:
        table = self._table(split)
        sampler = self._sampler(table, self.eval_batch_size, shuffle=False)
        step = {"val": "validation_step", "test": "test_step"}.get(split.partition("/")[0])
        return DataLoader(self._dataset(table, step), sampler=sampler, **self._loader_options())
