"""The Lightning data module for preferences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.budget import BudgetSampler
from lit_dpo.data.comparisons import Choice, Comparing, Ties
from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.encoding import encode_table
from lit_dpo.data.formats import Auto, Preference, PreferenceFormat, Ranking
from lit_dpo.data.formats.recognition import HEAD, choice, option
from lit_dpo.data.loader import PromptDataset, PromptLoader, TrainLoader, loader_options
from lit_dpo.data.mixture import Mixture, names, weighted_sources
from lit_dpo.data.position import first_position, position
from lit_dpo.data.reports import Ask, check_budget, check_lists, check_tokens, report, warn
from lit_dpo.data.sampler import PromptSampler
from lit_dpo.data.sources import RowSource, Source, load_rows, with_columns
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.stream_loader import StepLimits, StreamLoader
from lit_dpo.data.stream_order import StreamOrder
from lit_dpo.data.streaming import SHUFFLE_BUFFER, StreamSource, check_streaming, open_stream
from lit_dpo.data.table import PromptTable
from lit_dpo.data.truncation import Truncation, check_limits
from lit_dpo.errors import DataError, PolicyError, ResumeError
from lit_dpo.hub import locate, split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.policy import LoRAPolicy

    Tokenizer: TypeAlias = str | PreTrainedTokenizerBase
else:  # what a command line can say
    Tokenizer: TypeAlias = str

_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_BATCH_SIZE = 8


class PreferenceDataModule(LightningDataModule):
    """Preference pairs, and rankings of many completions, from files, the hub or `datasets`, encoded and batched.

    Everything that can be wrong with the data is found in `prepare_data`, before weights are loaded or a run directory
    is made: every row is read, checked and encoded there, once; the result is cached by content.

    Args:
        train: training pairs: a `.jsonl`, `.jsonl.gz`, `.json`, `.csv` or `.parquet` file, a pattern, a list of them, a
            hub data set as `organisation/name:split`, `lit-dpo/quickstart`; a `datasets.Dataset`, `DatasetDict` or
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
        chat_template_kwargs: more arguments for the tokenizer's chat template.

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
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        max_tokens: int | None = None,
        val_split: float = 0.0,
        num_workers: int = 0,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
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
        mixed = weighted_sources(train)
        if mixed and group_by_prompt is not None:
            raise ValueError("Expected no `group_by_prompt` with a mixture: an example could be of several sources.")
        check_streaming(streaming, shuffle_buffer, val_split=val_split, group_by_prompt=group_by_prompt)
        if weighted_sources(predict) is not None:
            raise DataError("Expected no weights for `predict`: a mixture is for `train` alone.")
        self.sources = {"train": train, **_by_name("val", val), **_by_name("test", test), "predict": predict}
        self.format = format
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        self.comparing = Comparing(comparisons, ties)
        self.group_by_prompt = group_by_prompt
        self.batch_size = _BATCH_SIZE if batch_size is None and max_tokens is None else batch_size
        self.eval_batch_size = eval_batch_size or self.batch_size
        self.max_tokens = max_tokens
        self.val_split = val_split
        self.num_workers = num_workers
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer or SHUFFLE_BUFFER
        self.seed = seed
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._tables: dict[str, PromptTable | None] = {}
        self._shares = [share for _, share in mixed or ()]
        self._stream: PromptStream | None = None  # of the training data, instead of a table
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
        self.setup(str(self.trainer.state.fn.value) if self.trainer and self.trainer.state.fn else "fit")

    def setup(self, stage: str) -> None:
        """Have the tables of a stage (`fit`, `validate`, `test` or `predict`)."""
        self._follow_policy()
        built = False
        splits = [one for split in _SPLITS[stage] for one in self._sets(split)]
        for split in splits:
            if split not in self._tables:  # building `train` may make `val`
                self._build(split)
                built = True
        if built and stage == "fit":
            self._warn_of_leaks()
        if stage in ("validate", "test"):
            for split in splits:
                self._table(split)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches, from the position of the checkpoint if one is resumed."""
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        options = self._loader_options()
        if self._stream is not None:
            self._stream.order.shuffle = shuffle
            rank, ranks = self._ranks
            limits = StepLimits(ranks, self.batch_size, self.max_tokens)
            self._train_loader = StreamLoader(self._stream, limits, rank, **options)
        else:
            table = self._table("train")
            sampler = self._sampler(table, self.batch_size, shuffle=shuffle)
            self._train_loader = PromptLoader(PromptDataset(table), sampler=sampler, **options)
        if trainer := self.trainer:
            self._train_loader.start = self._first_position
            self._train_loader.fetches_ahead = lambda: math.isinf(trainer.num_training_batches)
        return self._train_loader

    def val_dataloader(self) -> Any:
        """Batches in file order, by name if there are several sets; no loader if there are no validation data."""
        if all(self._tables.get(split) is None for split in self._sets("val")):
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
        return position(self.trainer, loader) | self._order_facts()

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
    def columns(self) -> dict[str, frozenset[str]]:
        """By split of this run, the names of the numbers that its rows bring, which travel as `columns`."""
        tables = self._tables | {"train": self._stream or self._tables.get("train")}
        return {split: frozenset(table.columns) for split, table in tables.items() if table is not None}

    def check_tokens(self, vocabulary: int, context: int | None, made_for: int | None, model: str) -> None:
        """See that a model can read all of this run; say once if some are longer than what it was made for.

        Raises:
            DataError: for the first comparison that it cannot, with file and row.
        """
        if self._stream is not None:
            self._stream.check_tokens(vocabulary, context, model)
        for split, table in self._tables.items():
            if table is not None:
                check_tokens(split, table, vocabulary, context, made_for, model)

    def check_lists(self, ask: Ask) -> None:
        """Let a loss over lists see what is compared, before a model is there.

        Args:
            ask: given `completions_per_prompt`, `comparisons` and `comparisons_per_prompt` of some prompts, raises a
                `ValueError` for those that it cannot use.

        Raises:
            DataError: for the first prompt that it refuses, with file and row.
        """
        if self._stream is not None:
            self._stream.check_lists(ask)
        for split, table in self._tables.items():
            if table is not None and not table.holds_pairs:
                check_lists(split, table, ask)

    # --- for reports -----------------------------------------------------------------------------------------------

    def preference(self, split: str, row: int) -> Preference | Ranking:
        """Return the raw prompt and completions of a row of a split, by its number in `batch.indices`.

        Splits are `train`, `val`, …, and `val/NAME` where there are several.
        """
        return self._rows(split).preference(row)

    def place(self, split: str, row: int) -> str:
        """Say in which file a row of a split is, and its number there."""
        return self._rows(split).place(row)

    def prompts(self, split: str, limit: int) -> list[tuple[int, list[int], Preference | Ranking]]:
        """Return the first `limit` prompts of a split: row number, token ids as trained on, what the row says.

        Of several sets, equally many each.
        """
        sets = self._sets(split)
        if sets != [split]:
            return [one for name in sets for one in self.prompts(name, -(-limit // len(sets)))][:limit]
        return self._rows(split).prompts(limit)

    # --- tables ----------------------------------------------------------------------------------------------------

    def _table(self, split: str) -> PromptTable:
        table = self._tables.get(split)
        if table is None:
            raise DataError(f"Expected `{split}` data but there are none: set `--data.{split}`.")
        return table

    def _rows(self, split: str) -> PromptTable | PromptStream:
        return self._stream if split == "train" and self._stream is not None else self._table(split)

    def _sets(self, split: str) -> list[str]:
        """Name a split's sets: itself, or `val/NAME` for each."""
        return [name for name in self.sources if name.startswith(f"{split}/")] or [split]

    def _build(self, split: str) -> None:
        if split == "train" or (split == "val" and self.sources["val"] is None and self.val_split):
            self._tables |= self._build_train()
        elif split == "predict":
            self._tables["predict"] = self._build_predict()
        else:
            self._tables[split] = None if self.sources[split] is None else self._encode(split)

    def _build_train(self) -> dict[str, PromptTable | None]:
        if self.sources["train"] is None:
            raise DataError("Expected training data but `train` is not set: name a file with `--data.train`.")
        if self.streaming:
            self._stream = self._open_stream()
            return {"train": None}
        table = self._encode("train")
        if self.sources.get("val") is not None or self._sets("val") != ["val"] or not self.val_split:
            return {"train": table}
        train, val = table.hold_out(self.val_split, self.seed)
        rank_zero_info(f"train: {train.summary}; val: {val.summary} (val_split={self.val_split}, by prompt)")
        return {"train": train, "val": val}

    def _build_predict(self) -> PromptTable:
        split = next((name for name in ("predict", "test", "val") if self.sources.get(name) is not None), None)
        if split is None and self.val_split and self.sources["train"] is not None:
            rank_zero_info("predict: no `predict` data are set, so those of `val_split` are used")
            held_out = self._build_train()["val"]
            assert held_out is not None
            return held_out
        if split is None:
            raise DataError(
                "Expected data to predict but none of `predict`, `test`, `val` is one set: use `--data.predict`."
            )
        if split != "predict":
            rank_zero_info(f"predict: no `predict` data are set, so those of `{split}` are used")
        return self._encode(split)

    def _encode(self, split: str) -> PromptTable:
        source = self.sources[split]
        assert source is not None
        stage = split.partition("/")[0]
        sources: list[RowSource] = []
        formats: list[PreferenceFormat] = []
        parts: list[int] = []
        for number, (part, _) in enumerate(weighted_sources(source) or [(source, 1.0)]):
            found = load_rows(part, None, stage=stage)
            if not isinstance(part, str | Sequence | Mapping) and not hasattr(part, "num_rows"):
                rank_zero_info(f"{split}: {found[0].name} was read to its end, into a table; see `streaming`")
            format = self._format_of(split, found)
            sources += [with_columns(one, format.columns, format.optional_columns) for one in found]
            formats += [format] * len(found)
            parts += [number] * len(found)
        table = encode_table(sources, formats, self._get_encoder(), self.comparing, self.group_by_prompt)
        if split == "train":
            self._parts = np.repeat(parts, [len(one.rows) for one in table.sources])
        report(split, table, self.truncation, self.comparing, self.group_by_prompt)
        check_budget(split, table, self.max_tokens)
        return table

    def _open_stream(self) -> PromptStream:
        """Find the training data's sources and their formats, and look at the first rows."""
        source = self.sources["train"]
        sources: list[StreamSource] = []
        formats: list[PreferenceFormat] = []
        groups: list[list[int]] = []
        for part, _ in weighted_sources(source) or [(source, 1.0)]:
            found = open_stream(part)
            format = self._format_of("train", found)
            groups.append([*range(len(sources), len(sources) + len(found))])
            sources += [one.with_columns(format.columns, format.optional_columns, one.head(HEAD)) for one in found]
            formats += [format] * len(found)
        order = StreamOrder(sources, formats, groups, self._shares or [1.0], self.shuffle_buffer, self.seed)
        rank_zero_info(f"train: {order}")
        return PromptStream(order, self._get_encoder(), self.comparing)

    def _format_of(self, split: str, sources: Sequence[RowSource | StreamSource]) -> PreferenceFormat:
        """Return the format that reads a split, and say which one was recognised."""
        if not isinstance(self.format, Auto):
            return self.format
        heads = [one.head(HEAD) for one in sources]
        formats = [self.format.of(one.name, head) for one, head in zip(sources, heads, strict=True)]
        for one, format in zip(sources, formats, strict=True):
            if format != formats[0]:
                raise DataError(
                    f"{split}: Expected files of one layout but {sources[0].name} is read by `{option(formats[0])}` "
                    f"and {one.name} by `{option(format)}`."
                )
        if self.format == Auto():
            rank_zero_info(f"{split}: {choice(formats[0], heads[0])}")
        return formats[0]

    def _get_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._policy = self._policy_now
            self._encoder = self._make_encoder()
        return self._encoder

    def _make_encoder(self) -> PromptEncoder:
        return PromptEncoder(
            self._load_tokenizer(),
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation=self.truncation,
            chat_template_kwargs=self.chat_template_kwargs,
        )

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
            self._tables, self._stream = {}, None

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            policy = self._policy_now
            if policy is None:
                raise DataError("Expected `tokenizer` to be set, because there is no module whose policy has one.")
            return policy.load_tokenizer()
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        from transformers import AutoTokenizer

        try:
            folder = locate(*split_revision(self.tokenizer), "data.tokenizer").folder
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (PolicyError, OSError, ValueError) as error:
            raise DataError(f"Expected a tokenizer at `{self.tokenizer}` but it cannot be loaded: {error}") from error

    def _warn_of_leaks(self) -> None:
        if self._stream is not None:
            if any(self._tables.get(split) for split in self._sets("val")):
                rank_zero_info("val: whether prompts are in train too is not known, for train is streamed")
            return
        train = self._table("train")
        for split in self._sets("val"):
            val = self._tables.get(split)
            leaked = 0 if val is None else int(np.isin(val.prompt_keys, train.prompt_keys).sum())
            if val is not None and leaked:
                said = f"{split}: {leaked} of {val.size} {val.unit} have a prompt that is in train too"
                warn(f"{said}; validation looks too good")

    # --- loaders ---------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _mixture(self, table: PromptTable, multiple: int) -> Mixture:
        """Return the order of the training data's sources, and say what an epoch is."""
        mixture = Mixture(self._parts[table.rows], self._shares, multiple, names(self.sources["train"]))
        rank_zero_info(f"train: {mixture}")
        return mixture

    def _sampler(self, table: PromptTable, batch_size: int | None, *, shuffle: bool) -> PromptSampler:
        rank, ranks = self._ranks
        order: dict[str, Any] = {"seed": self.seed, "shuffle": shuffle, "rank": rank, "num_replicas": ranks}
        if shuffle and self._shares:
            order["mixture"] = self._mixture(table, 1 if self.max_tokens is not None else (batch_size or 1) * ranks)
        if self.max_tokens is not None:
            return BudgetSampler(table.lengths, self.max_tokens, batch_size, **order)
        assert batch_size is not None
        return PromptSampler(table.lengths, batch_size, **order)

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
        """Say what decides which prompts the next batches hold."""
        if self._stream is not None:
            return self._stream.order.facts | self._batch_facts()
        table = self._table("train")
        counts: dict[str, Any] = {"pairs": table.size}
        if not table.holds_pairs:
            counts = {
                "prompts": table.size,
                "completions": len(table.completion_lengths),
                "comparisons": table.comparisons_count,
            }
        return counts | ({"shares": self._shares} if self._shares else {}) | self._batch_facts()

    def _batch_facts(self) -> dict[str, int | None]:
        return {
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "ranks": self._ranks[1],
            "seed": self.seed,
        }

    def _eval_loaders(self, split: str) -> DataLoader[CompletionBatch] | dict[str, DataLoader[CompletionBatch]]:
        sets = self._sets(split)
        if sets == [split]:
            return self._eval_loader(split)
        return {name.partition("/")[2]: self._eval_loader(name) for name in sets}

    def _eval_loader(self, split: str) -> DataLoader[CompletionBatch]:
        table = self._table(split)
        sampler = self._sampler(table, self.eval_batch_size, shuffle=False)
        return DataLoader(PromptDataset(table), sampler=sampler, **self._loader_options())


def _by_name(split: str, source: Source | Mapping[str, Source] | None) -> dict[str, Source | None]:
    """Name a split's sources: by its own name, or several by `split/NAME`.

    Raises:
        DataError: for names that cannot be part of a metric's name, or weights.
    """
    if weighted_sources(source) is not None:
        raise DataError(f"Expected sets by name for `{split}` but got weights: a mixture is for `train` alone.")
    if not isinstance(source, Mapping) or hasattr(source, "column_names"):  # a `DatasetDict` has splits, not sets
        return {split: source}
    if not source or not all(isinstance(name, str) and name and "/" not in name for name in source):
        raise DataError(f"Expected names without `/` for the sets of `{split}` but got {list(source)}.")
    return {f"{split}/{name}": one for name, one in source.items()}
