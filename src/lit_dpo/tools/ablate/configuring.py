"""`lit-dpo fit`, for many runs in one process: its parser is built once, and nothing is built twice for one run."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lit_dpo.callbacks import AdapterExport, LastCheckpoint, SampleCompletions
from lit_dpo.errors import AblationError
from lit_dpo.lightning_cli import LitDPOCLI
from lit_dpo.tools.ablate.recording import Recorder, Rows

_MINUTES = 10.0
"""From one checkpoint of a run to the next, besides those of its epochs."""


class FitCLI(LitDPOCLI):
    """Parses and builds runs of `fit`, one after another. Building it parses nothing."""

    def __init__(self) -> None:
        self._ready = False
        self.folder: Path | None = None
        self.alone = False
        self.recorder = Recorder()
        super().__init__(args=[])
        self._ready = True

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` alone."""
        return {"fit": LitDPOCLI.subcommands()["fit"]}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Nothing yet; see `parse`."""
        self.config = Namespace(subcommand="fit", fit=Namespace())  # type: ignore[no-untyped-call]

    def _set_seed(self) -> None:
        if self._ready:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Nothing yet; see `build`."""
        if self._ready:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing; see `fitted`."""

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """Parse the arguments of a run, as `lit-dpo fit` does; the whole configuration.

        Raises:
            AblationError: for what cannot be parsed, in the words of `fit`.
        """
        vars(self).pop("config_dump", None)
        # chosen for the run before, by its accelerator
        self._parser("fit").set_defaults({"trainer.precision": None})
        with _refusals():
            self.config = self.parser.parse_args(["fit", *arguments])
        self._parse_ckpt_path()
        found: Namespace = self.config["fit"]
        return found

    def text(self) -> str:
        """Return the configuration that was parsed, as YAML, without the files that it was read from."""
        config = self.config["fit"].clone()
        config.pop("config", None)
        return str(self._parser("fit").dump(config, skip_none=False))

    def built(self) -> tuple[pl.LightningModule, pl.LightningDataModule, list[Any]]:
        """Build module, data and callbacks, and no trainer; no weights load.

        Raises:
            AblationError: for a value that a class refuses.
        """
        with _refusals():
            self._built_trainer = False
            try:
                super().instantiate_classes()
            finally:
                self._built_trainer = True
        callbacks = self._get(self.config_init, "trainer").get("callbacks") or []
        return self.model, self.datamodule, callbacks if isinstance(callbacks, list) else [callbacks]

    _built_trainer = True

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Log into the run's folder, and leave out what one of many runs does not need.

        Without a folder nothing is written; of a run that is `alone`, where its configuration says.
        """
        if not self._built_trainer:
            return None
        config = self.config_init["fit"]["trainer"]
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if self.alone and self.folder is None:
            config["callbacks"] = [*callbacks, self.recorder]
            return super().instantiate_trainer(**kwargs)
        kept = [one for one in callbacks if not isinstance(one, SampleCompletions | ProgressBar)]
        config["enable_progress_bar"] = False
        if self.folder is None:
            config["callbacks"], config["logger"] = [*kept, self.recorder], False
            config["enable_checkpointing"] = False
            return super().instantiate_trainer(**kwargs)
        if not any(isinstance(one, LastCheckpoint) for one in kept):
            kept.append(LastCheckpoint(every_n_minutes=_MINUTES))
        config["callbacks"] = [*kept, self.recorder]
        loggers = config.get("logger")
        loggers = loggers if isinstance(loggers, list) else [loggers]
        own = TensorBoardLogger(self.folder.parent, self.folder.name, version="", default_hp_metric=False)
        others = [one for one in loggers if not isinstance(one, TensorBoardLogger | bool | None)]
        config["logger"] = [own, Rows(self.folder, self.recorder), *others]
        return super().instantiate_trainer(**kwargs)

    def build(self) -> None:
        """Seed, and build everything for `folder`; the file of the configuration is kept if it is there."""
        before = self.save_config_callback
        if self.folder is not None and (self.folder / "config.yaml").exists():
            self.save_config_callback = None
        try:
            self._set_seed()
            with _refusals():
                self.instantiate_classes()
        finally:
            self.save_config_callback = before

    def fitted(self) -> None:
        """Train."""
        given = self.config_init["fit"]
        how = {name: given[name] for name in ("ckpt_path", "weights_only") if name in given}
        self.trainer.fit(self.model, datamodule=self.datamodule, **how)


def check_places(callbacks: Sequence[Any]) -> None:
    """See that no callback would write into one folder for all runs.

    Raises:
        AblationError: naming it.
    """
    for one in callbacks:
        if isinstance(one, ModelCheckpoint | LastCheckpoint | AdapterExport):
            option = "dirpath" if isinstance(one, ModelCheckpoint) else "directory"
            if (given := getattr(one, option)) is not None:
                raise AblationError(
                    f"Expected no `{option}` for {type(one).__name__} but got {given}: all runs would write there. "
                    "Leave it out; each run has a folder."
                )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the end of a program into an error, with what was said."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code != 2:
            raise
        text = said.getvalue().strip().removeprefix("lit-dpo: error: ")
        raise AblationError(text or "the arguments cannot be parsed.") from None


@contextmanager
def quiet(said: dict[str, None] | None = None) -> Iterator[None]:
    """Print none of Lightning's lines; collect them, each once, in `said`."""

    def note(record: logging.LogRecord) -> bool:
        if said is not None:
            said[record.getMessage()] = None
        return False

    loggers = [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("pytorch", "fabric")]
    loggers.append(logging.getLogger("lightning.fabric.utilities.seed"))
    for logger in loggers:
        logger.addFilter(note)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(note)
