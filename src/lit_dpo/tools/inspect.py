"""`lit-dpo inspect`: what is wrong with the data of a run, and what to do about it. No weights are read."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.doctor import examine
from lit_dpo.errors import DataError, LitDPOError
from lit_dpo.lightning_cli import LitDPOCLI
from lit_dpo.module import DPOModule
from lit_dpo.parser import Parser, refuse
from lit_dpo.tools.reports.page import page
from lit_dpo.tools.reports.record import Inspected, as_json
from lit_dpo.tools.reports.terminal import show
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message.get('reasoning_content') %}"
    "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{{- message.get('content') or '' }}"
    "{%- if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{- '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for tokenizers without a template of their own: everything that a conversation may hold is rendered."""
_CHATML = ["<|im_start|>", "<|im_end|>"]


class InspectCLI(LitDPOCLI):
    """Reads what `fit` reads, and makes no trainer and no model."""

    def __init__(self, args: list[str]) -> None:
        self._typed: Any = None
        super().__init__(args, run=False)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As for `fit`, but that a model may be absent."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(DPOModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's own; those of `fit` are accepted, too, so that its files are."""
        assert isinstance(parser, Parser)
        parser.is_command = True
        parser.defaults_below = self._defaults
        parser.set_defaults({"data": {"class_path": "lit_dpo.data.datamodule.PreferenceDataModule"}})
        parser.add_method_arguments(pl.Trainer, "fit", skip=set(self.subcommands()["fit"]))
        parser.add_argument("--strict", action="store_true", help="Exit with 1 if a finding is above its threshold.")
        parser.add_argument("--out", type=str | None, help="Folder for `report.json` and `report.html`.")
        parser.add_argument("--examples", type=int, default=3, help="How many prompts are shown decoded.")
        parser.add_argument(
            "--thresholds",
            type=dict[str, float],
            default={},
            help="Another threshold for a finding, by its name: `--thresholds.duplicates 0.01`.",
        )
        parser.add_argument(
            "--plan",
            type=str,
            nargs="?",
            const="here",
            default=argparse.SUPPRESS,
            help="Memory and hours too, as `lit-dpo fit --plan` says them; needs a model.",
        )

    def _defaults(self, typed: Namespace) -> Mapping[str, Any]:
        self._typed = typed
        return {"model": {"class_path": "lit_dpo.module.DPOModule"}} if typed.get("model") else {}

    def typed(self, name: str) -> bool:
        """Whether an option of the data was typed, or is in a file."""
        data = self._typed.get("data") or {}
        return name in (data.get("init_args") or {})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them, without a warning that there are others in `sys.argv`: they are the same, in another order."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing is resumed."""

    def _set_seed(self) -> None:
        """Nothing is random."""

    def instantiate_classes(self) -> None:
        """Build the data module, and the module if there is one."""
        self.datamodule, self.model = self._built("data"), self._built("model")

    def new_data(self) -> Any:
        """Build the data module again, without what it has read."""
        return self._built("data")

    def _built(self, wanted: str) -> Any:
        config = self.config.clone()
        for name in [name for name in vars(config) if name != wanted]:
            del config[name]
        try:
            return self.parser.instantiate_classes(config).get(wanted)
        except LitDPOError:
            raise
        except (ValueError, MisconfigurationException, ModuleNotFoundError) as error:
            refuse(str(error))


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo inspect`.

    Args:
        args: the command line after `inspect`.

    Raises:
        LitDPOError: for data or options that cannot be used.
        SystemExit: with 1 if `--strict` is given and a finding is above its threshold.
    """
    cli = InspectCLI(files_first(args))
    given = inspected(cli)
    show(given, Console())
    if cli.config.out:
        write(given, Path(cli.config.out))
    if cli.config.strict and given.examined.above:
        raise SystemExit(1)


def files_first(args: Sequence[str]) -> list[str]:
    """Put configuration files before what is typed, which holds.

    Example:
        >>> files_first(["--data.train", "pairs.jsonl", "--config", "run.yaml", "--strict"])
        ['--config', 'run.yaml', '--data.train', 'pairs.jsonl', '--strict']
    """
    files: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for one in rest:
        if one in ("-c", "--config"):
            files += [one, *islice(rest, 1)]
        else:
            (files if one.startswith("--config=") else others).append(one)
    return files + others


def inspected(cli: InspectCLI) -> Inspected:
    """Read the data of a configuration, and look at them.

    Raises:
        LitDPOError: if they cannot be used.
    """
    data = cli.datamodule
    if not isinstance(data, PreferenceDataModule):
        raise DataError(f"Expected a PreferenceDataModule to inspect but got {type(data).__name__}.")
    data.on_bad_row = "drop"  # all are counted, and a run's own option decides there
    tokenizer, name, notes = _tokenizer(cli, data)
    if data.streaming:
        data.streaming = False
        notes.append("what a run would stream is read as a table, to its end")
    data.tokenizer = tokenizer
    with unsaid("lit_dpo.data.reports"):  # the report says the same, and more
        data, more = _read(cli, data, tokenizer)
    examined = examine(data.tables, tokenizer, data.comparing, cli.config.thresholds, cli.config.examples)
    sources = ", ".join(source.name for source in data.tables["train"].sources)
    given = Inspected(sources, name, [*notes, *more, *examined.notes], examined, _steps(cli, data))
    return given._replace(plan=_plan(cli, data)) if "plan" in cli.config else given


@contextmanager
def unsaid(name: str) -> Iterator[None]:
    """Let a logger say errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _tokenizer(cli: InspectCLI, data: PreferenceDataModule) -> tuple[PreTrainedTokenizerBase, str, list[str]]:
    """Return the tokenizer that a run would have, or else the built-in one, what it is called, and what to say."""
    if data.tokenizer is not None:
        found = data.loaded_tokenizer
        return found, str(found.name_or_path), []
    if (policy := getattr(cli.model, "policy", None)) is not None:
        return policy.load_tokenizer(), str(policy.model), []
    from lit_dpo.quickstart import quickstart_tokenizer

    notes = ["no tokenizer is configured: `--data.tokenizer` or `--model.policy.model` counts as your model does"]
    if not cli.typed("max_length") and data.max_length is not None:
        data.max_length = None
        notes.append("without it, no row is dropped for its length")
    tokenizer = quickstart_tokenizer()
    _add_template(tokenizer)
    return tokenizer, "`lit-dpo/quickstart`, the built-in example", [*notes, "conversations are rendered as ChatML"]


def _add_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": _CHATML}, replace_extra_special_tokens=False)


def _read(
    cli: InspectCLI, data: PreferenceDataModule, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreferenceDataModule, list[str]]:
    """Read and encode all splits; conversations with a template of ours if the tokenizer has none."""
    notes = []
    try:
        data.setup("fit")
    except DataError:
        if tokenizer.chat_template is not None:
            raise
        _add_template(tokenizer)
        options = {"tokenizer": tokenizer, "on_bad_row": data.on_bad_row, "streaming": data.streaming}
        data = cli.new_data()  # the other one knows the tokenizer as it was, and its cache
        vars(data).update(options)
        data.setup("fit")
        notes = [
            "the tokenizer has no chat template: conversations are rendered as ChatML here, and `fit` refuses them"
        ]
    if any(source is not None for name, source in data.sources.items() if name.partition("/")[0] == "test"):
        data.setup("test")
    return data, notes


def _steps(cli: InspectCLI, data: PreferenceDataModule) -> tuple[int, float] | None:
    """Count the steps of the configured run; None if nothing says how long it trains."""
    from lit_dpo.plan.plan import planned_steps

    trainer = cli.config.trainer
    limit = 1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches
    asked = SimpleNamespace(
        limit_train_batches=limit,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
    )
    try:
        return planned_steps(asked, len(data.train_dataloader()))  # type: ignore[arg-type]
    except LitDPOError:
        return None


def _plan(cli: InspectCLI, data: PreferenceDataModule) -> str:
    """Say what a run needs, or why that cannot be said."""
    from lit_dpo.plan import plan

    if cli.model is None:
        return "needs a model: give `--model.policy.model`"
    options = {**vars(cli.config.trainer), "logger": False, "callbacks": None, "enable_checkpointing": False}
    try:
        trainer = pl.Trainer(**options)
        return str(plan(cli.model, data, trainer, cli.config.plan))
    except (LitDPOError, ValueError, MisconfigurationException) as error:
        return f"none: {error}"


def write(given: Inspected, folder: Path) -> None:
    """Write `report.json` and `report.html`, each whole or not at all.

    Raises:
        TrainingError: if the disk refuses.
    """
    for name, text in (("report.json", as_json(given)), ("report.html", page(given))):
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        log.info("%s", folder / name)
