from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lit_dpo.callbacks.alone import alone
from lit_dpo.checkpoint import configuration

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule

_FIRST = ("lr", "beta", "r", "loss")
_COMPARED = ("reward_accuracy", "loss", "reward_margin", "kl")
_SETS = "(.+/)?"  # where several sets are validated, each has its curve


def _chart(*names: str, stages: Sequence[str] = ("train", "val")) -> list[Any]:
    return ["Multiline", [f"{stage}/{_SETS}{name}$" for name in names for stage in stages]]


_LAYOUT = {
    "What matters": {
        "reward accuracy": _chart("reward_accuracy"),
        "reward margin": _chart("reward_margin"),
        "rewards of chosen and rejected": _chart("chosen_reward", "rejected_reward", stages=["val"]),
        "rewards of chosen and rejected, training": _chart("chosen_reward", "rejected_reward", stages=["train"]),
        "loss": _chart("loss"),
        "KL to the reference": _chart("kl"),
        "learning rate": ["Multiline", ["train/(learning_rate.*|lr-.*)$"]],
    },
    "What else": {
        "log-probs of chosen and rejected, nats per token": _chart("chosen_logps", "rejected_logps"),
        "parts of the loss": _chart("loss_.+"),
        "tokens per second": ["Multiline", ["train/tokens_per_second$"]],
        "memory, GiB": ["Multiline", ["train/memory_gib$"]],
    },
}
"""What TensorBoard's tab `Custom Scalars` shows, by regular expressions of names."""


class RunLogger(TensorBoardLogger):
    """Lightning's `TensorBoardLogger`; TensorBoard opens on `train` and `val`, and not on the number of the epoch.

    It opens the first two groups of curves by the alphabet. So what has no group gets one: a learning rate is written
    as `train/lr-…`, the epoch as `when/epoch`. Names that callbacks monitor are as they were.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers, by a name that has a group."""
        super().log_metrics({_grouped(name): value for name, value in metrics.items()}, step)


def _grouped(name: str) -> str:
    if name == "epoch":
        return "when/epoch"
    return f"train/{name}" if name.startswith("lr-") and "/" not in name else name


def lay_out(trainer: pl.Trainer) -> None:
    """Tell TensorBoard which curves belong into one chart; other loggers have no such thing."""
    with alone("The layout of TensorBoard"):
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(_LAYOUT)


def describe_run(trainer: pl.Trainer, pl_module: DPOModule) -> None:
    """Write short hyper-parameters for all loggers; TensorBoard compares runs by them, and by what is measured last.

    TensorBoard takes what is written first, so that this comes before Lightning's own list, which has long names.
    """
    with alone("The list of hyper-parameters"):
        given = short(configuration(pl_module))
        stage, metrics = "train", pl_module.train_metrics
        if trainer.enable_validation:
            stage, metrics = "val", pl_module.val_metrics
        compared = [name for one in _COMPARED if (name := f"{stage}/{one}") in metrics.keys()]  # noqa: SIM118 - prefixed
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(given)
            elif trainer.is_global_zero:
                _write(logger, *_session(given, compared)[:2])


def end_run(trainer: pl.Trainer) -> None:
    """Tell TensorBoard that the run has ended well."""
    with alone("The end of the list of hyper-parameters"):
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                _write(logger, _session({}, [])[2])


def _session(given: Mapping[str, Any], compared: Sequence[str]) -> tuple[Any, Any, Any]:
    """Make what the tab `HParams` shows: an experiment, the start of a run, and its end.

    The tab shows names that are said to differ first, and each group by the alphabet. Lightning's own way says it of
    none, and writes each measure a second time.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import hparams

    experiment, start, end = hparams(dict(given), dict.fromkeys(compared, 0.0))
    held = experiment.value[0].metadata.plugin_data
    described = HParamsPluginData.FromString(held.content)
    for info in described.experiment.hparam_infos:
        info.differs = info.name in _FIRST
    held.content = described.SerializeToString()
    return experiment, start, end


def _write(logger: TensorBoardLogger, *those: Any) -> None:
    for one in those:
        logger.experiment.file_writer.add_summary(one)


def short(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Give each hyper-parameter the shortest name that is no other's; what is varied most comes first.

    Example:
        >>> loss = {"class_path": "lit_dpo.losses.ipo.IPOLoss", "init_args": {"beta": 0.1}}
        >>> short({"policy": {"class_path": "lit_dpo.policy.lora.LoRAPolicy", "init_args": {"r": 8}}, "loss": loss})
        {'beta': 0.1, 'r': 8, 'loss': 'IPOLoss', 'policy': 'LoRAPolicy'}
    """
    found = dict(_leaves(nested, ()))
    ends = Counter(path[-count:] for path in found for count in range(1, len(path) + 1))
    named = {}
    for path, value in found.items():
        alone_there = (n for n in range(1, len(path)) if ends[path[-n:]] == 1 and not path[-n].isdigit())
        count = next(alone_there, len(path))
        named[".".join(path[-count:])] = value
    return {name: named.pop(name) for name in _FIRST if name in named} | named


def _leaves(given: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Go through what is no container, with the names that lead to it; a class is the value of its argument."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            if name == "class_path" and path:
                yield path, str(value).rpartition(".")[2]
            elif not name.startswith("_"):
                yield from _leaves(value, path if name == "init_args" else (*path, name))
    elif isinstance(given, list) and any(isinstance(one, Mapping) for one in given):
        for place, one in enumerate(given):
            yield from _leaves(one, (*path, str(place)))
    else:
        yield path, given if given is None or isinstance(given, str | int | float | bool) else str(given)
