"""What users have of a run, and how it loads: an adapter's folder, a checkpoint, a run's folder, a whole model."""

from __future__ import annotations

import argparse
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from lit_dpo import hub
from lit_dpo.errors import LitDPOError, PolicyError, ResumeError, first_line
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.base_model import QUICKSTART
from lit_dpo.policy.checks import as_policy_error
from lit_dpo.policy.files import json_object
from lit_dpo.versions import CHECKPOINT, check_version

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_PARTS = {"base", "policy", "loss", "reference", "data", "measures"}
_ADAPTER, _MODEL = "adapter_config.json", "config.json"


class Trained(NamedTuple):
    """Something that was trained, or a model as it comes.

    Attributes:
        kind: `adapter`, a PEFT folder; `checkpoint`, a file of Lightning's; `model`, whole weights.
        path: where it is; of a hub id the folder of its commit.
        name: as it is called: the hub id, or the path.
        policy: how it loads: its base and adapter, and the quantisation that it was trained under.
        said: what it says of its run (`lit_dpo.json`, or a checkpoint); empty where it says nothing.
        config: the run's configuration file, if it is near.
    """

    kind: Literal["adapter", "checkpoint", "model"]
    path: Path
    name: str
    policy: LoRAPolicy
    said: Mapping[str, Any]
    config: Path | None

    @property
    def has_reference(self) -> bool:
        """Whether there is a model behind it, that it was trained from."""
        return self.kind != "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model loads; `find` reads it."""
    group = parser.add_argument_group("how it loads")
    group.add_argument("--base", help="the adapter's base, if it is not where it was: a folder or a hub id")
    group.add_argument("--revision", help="branch, tag or commit of a base, or of a model, of the hub")
    group.add_argument(
        "--quantization",
        choices=("nf4", "int8", "none"),
        help="of the base; default: as it was trained, if that is known",
    )
    group.add_argument(
        "--adapter_base",
        choices=("same", "any"),
        default="same",
        help="`same` refuses a base that is known to be another one than it was trained on; default: same",
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    group.add_argument("--device", default="auto", help="`cpu`, `cuda`, `cuda:1`, …; default: a GPU if there is one")


def device_of(given: str) -> torch.device:
    """Return the device that an option names.

    Raises:
        PolicyError: if there is none such.
    """
    import torch

    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(given)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise PolicyError(f"Expected `--device` to be a device of this machine but got {given!r}.") from error
    return found


def find(name: str, given: argparse.Namespace, dtype: str | None = None) -> Trained:
    """See what a name stands for, and how it loads; no weights are read.

    Args:
        name: an adapter's folder, a `.ckpt`, a run's folder, a model's folder, a hub id (`organisation/name@revision`)
            of an adapter or a model, or `lit-dpo/quickstart`.
        given: options of `add_arguments`.
        dtype: of computation, as `LoRAPolicy` has it. None: as it was trained.

    Raises:
        LitDPOError: if there is nothing such, or an option does not go with it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _checkpoint(path, given, dtype)
    if path.is_dir() and not (path / _ADAPTER).is_file() and not (path / _MODEL).is_file():
        return find(str(_of_run(path)), given, dtype)
    if name == QUICKSTART:
        return _model(name, path, given, dtype)
    at, revision = hub.split_revision(name)
    place = hub.locate(at, revision, "the model")
    if (place.folder / _ADAPTER).is_file():
        return _adapter(name, hub.locate_adapter(name, "the adapter").folder, given, dtype)
    if not (place.folder / _MODEL).is_file():
        raise PolicyError(f"Expected a model or an adapter in {place} but it holds {hub.listing(place)}.")
    if revision and given.revision:
        raise PolicyError(f"Expected one revision but got two: {revision!r} in {name!r}, and `--revision`.")
    return _model(
        at, place.folder, argparse.Namespace(**{**vars(given), "revision": revision or given.revision}), dtype
    )


def _of_run(folder: Path) -> Path:
    """Choose what a run's folder offers: the adapter of its end, or its last checkpoint."""
    adapters = sorted(one.parent for one in folder.glob(f"adapter*/{_ADAPTER}"))
    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"), key=_moment)
    last = [*checkpoints, *folder.glob("last.ckpt")]
    if not adapters and not last:
        held = ", ".join(sorted(one.name for one in folder.iterdir())[:12]) or "nothing"
        raise PolicyError(
            f"Expected a run, an adapter or a model in {folder} but it holds {held}: no adapter, no checkpoint, no "
            "config.json of a model."
        )
    found = adapters[-1] if adapters else last[-1]
    others = [one for one in [*adapters, *last] if one != found]
    log.info("%s of %s%s", found.relative_to(folder), folder, "; others can be given by path" if others else "")
    return found


def _adapter(name: str, folder: Path, given: argparse.Namespace, dtype: str | None) -> Trained:
    said = _said(folder)
    theirs = json_object(folder / _ADAPTER)
    base, revision = str(theirs.get("base_model_name_or_path") or ""), theirs.get("revision")
    known = said.get("base", {})
    if known.get("model") == QUICKSTART:
        base, revision = QUICKSTART, None  # made on this machine, at another path
    if Path(base).expanduser().is_dir():
        revision = None
    if given.base:
        base, revision = given.base, given.revision
    elif given.revision:
        revision = given.revision
    if not base:
        raise PolicyError(f"The adapter in {folder} does not name its base: give it with `--base`.")
    if not known and not given.quantization:
        log.info(
            "the adapter in %s does not say how its base was quantised in training: not at all, unless "
            "`--quantization nf4` says so",
            folder,
        )
    quantization = given.quantization or known.get("quantization", "none")
    policy = LoRAPolicy(
        base,
        revision=revision,
        quantization=quantization,
        double_quantization=_double(quantization, known),
        adapter_path=str(folder),
        adapter_base=given.adapter_base,
        dtype=cast("Any", dtype or said.get("policy", {}).get("dtype", "auto")),
        trust_remote_code=given.trust_remote_code,
    )
    return Trained("adapter", folder, name, policy, said, _config_near(folder))


def _double(quantization: str, known: Mapping[str, Any]) -> bool:
    """Whether NF4's scales were quantised; elsewhere the field's default, the only value that is taken."""
    return (
        True if quantization != "nf4" or known.get("quantization") != "nf4" else bool(known.get("double_quantization"))
    )


def _model(name: str, folder: Path, given: argparse.Namespace, dtype: str | None) -> Trained:
    if given.base:
        raise PolicyError(f"`--base` has no effect on a whole model, and {name} is one: leave it out.")
    policy = LoRAPolicy(
        name,
        revision=given.revision,
        quantization=given.quantization or "none",
        dtype=cast("Any", dtype or "auto"),
        trust_remote_code=given.trust_remote_code,
    )
    return Trained("model", folder, name, policy, {}, None)


def _checkpoint(path: Path, given: argparse.Namespace, dtype: str | None) -> Trained:
    """Build the policy that a checkpoint names, without weights; no file says that a stranger's code runs."""
    from lightning.pytorch.cli import instantiate_module

    from lit_dpo.checkpoint import KEY, hyper_parameters, only_known_classes, read_checkpoint, untrusting
    from lit_dpo.module import NAMED_IN_FILES, DPOModule

    if not zipfile.is_zipfile(path):
        raise ResumeError(f"Expected a checkpoint, an adapter's folder or a model's but {path} is none of them.")
    checkpoint = read_checkpoint(path)
    hyper = hyper_parameters(path, DPOModule.CHECKPOINT_HYPER_PARAMS_KEY)
    if KEY not in checkpoint or not hyper:
        raise ResumeError(f"Expected a checkpoint of lit_dpo but {path} does not say what its weights belong to.")
    hyper = {**hyper, **untrusting(path, DPOModule.CHECKPOINT_HYPER_PARAMS_KEY)}
    said_of = {"policy": hyper.get("policy")}  # alone: a module and a loss of one's own are not needed to sample
    try:
        with only_known_classes(said_of, DPOModule, NAMED_IN_FILES):
            policy: LoRAPolicy = instantiate_module(DPOModule, said_of).policy
    except ResumeError as error:
        raise ResumeError(f"{error} Or give the adapter's folder next to it, which names no classes.") from error
    except LitDPOError:
        raise
    except (Exception, SystemExit) as error:  # of jsonargparse, of many kinds
        raise ResumeError(f"The policy that {path} names cannot be built: {first_line(error)}") from error
    changes: dict[str, Any] = {"adapter_base": given.adapter_base, "trust_remote_code": given.trust_remote_code}
    if given.base or given.revision:
        changes |= {"model": given.base or policy.model, "revision": given.revision}
    if given.quantization and given.quantization != policy.quantization:
        changes |= {"quantization": given.quantization, "double_quantization": True}
    if dtype:
        changes["dtype"] = dtype
    policy = replace(policy, **changes)
    said = {**checkpoint[KEY], "steps": checkpoint.get("global_step"), "epochs": checkpoint.get("epoch")}
    return Trained("checkpoint", path, str(path), policy, said, _config_near(path))


def _said(folder: Path) -> dict[str, Any]:
    """Read what an adapter's folder says of its run; where it has no record, what the checkpoint next to it says."""
    from lit_dpo.checkpoint import KEY, RECORD, read_checkpoint

    file = folder / RECORD
    if not file.is_file():
        # the checkpoint of a folder has its name; the adapter of a run's end lies next to the last one
        files = [folder.with_name(f"{folder.name}.ckpt"), folder.with_name("last.ckpt")]
        near = next((one for one in files[: 1 + folder.name.startswith("adapter")] if zipfile.is_zipfile(one)), None)
        return {} if near is None else dict(read_checkpoint(near).get(KEY, {}))
    found = json_object(file)
    check_version(found.get("version"), CHECKPOINT, file)
    return _known(found)


def _known(found: dict[str, Any]) -> dict[str, Any]:
    """Of a record, which may be a stranger's, what has the form that is read."""
    parts = {name: value for name in _PARTS if isinstance(value := found.get(name), dict)}
    if "data" in parts:
        parts["data"] = {split: counts for split, counts in parts["data"].items() if isinstance(counts, dict)}
    if "measures" in parts:
        parts["measures"] = {name: value for name, value in parts["measures"].items() if isinstance(value, int | float)}
    return {name: value for name, value in found.items() if name not in _PARTS} | parts


def _config_near(path: Path) -> Path | None:
    """Find the run's `config.yaml`: next to an adapter or a checkpoint, or one folder further up."""
    for folder in list(path.resolve().parents)[:2]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def _moment(checkpoint: Path) -> tuple[int, int]:
    """When a checkpoint was made: by the step in its name, as clocks may be changed; then by its time."""
    step = re.search(r"step=(\d+)", checkpoint.stem)
    return int(step.group(1)) if step else -1, checkpoint.stat().st_mtime_ns


# --- loading -------------------------------------------------------------------------------------------------------


def check_base(trained: Trained) -> bool | None:
    """Compare a base's content with what an adapter or a checkpoint says that it was trained on.

    Returns:
        True if it is the same; None if nothing is said of it, or it was a model in memory.

    Raises:
        ResumeError: if it is another one and `--adapter_base any` does not allow that.
    """
    known = trained.said.get("base", {})
    theirs = str(known.get("fingerprint", "memory"))
    if not trained.has_reference or theirs.startswith("memory"):
        return None
    mine = trained.policy.model_identity()
    commits = {known.get("commit"), mine.get("commit")}
    if mine["fingerprint"] == theirs or (len(commits) == 1 and None not in commits):
        return True
    told = (
        f"{trained.name} was trained on {known.get('model')}, with the content {theirs}; {trained.policy.place} has "
        f"the content {mine['fingerprint']}"
    )
    if trained.policy.adapter_base == "any":
        log.warning("%s: it is another model, which `--adapter_base any` allows", told)
        return False
    raise ResumeError(f"{told}: it is another model. Give the base that it was trained on with `--base`.")


def load(trained: Trained, device: torch.device) -> Any:
    """Load it, frozen and in evaluation mode: a `peft.PeftModel`, or a transformers model for `model`.

    Raises:
        LitDPOError: if it does not load, or its base is another one than it was trained on.
    """
    policy = trained.policy
    policy.fetch()
    if check_base(trained):  # by its content: where the adapter says that it was does not matter
        policy = replace(policy, adapter_base="any")
    if trained.kind != "checkpoint":
        return policy.load_frozen(device)
    from lit_dpo.checkpoint import load_strictly, read_checkpoint
    from lit_dpo.policy.adapters import adapter_parameters, is_adapters

    model = policy.load(device)
    known = {f"model.{name}": p for name, p in adapter_parameters(model).items()}
    given = {name: p for name, p in read_checkpoint(trained.path)["state_dict"].items() if is_adapters(name)}
    load_strictly(known, given, training=False)
    return model.requires_grad_(False).eval()


def tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    """Return the one that it was trained with: of its folder, or that next to a checkpoint, else its base's."""
    from transformers import AutoTokenizer

    folder = trained.path.with_suffix("") if trained.kind == "checkpoint" else trained.path
    if trained.has_reference and (folder / "tokenizer_config.json").is_file():  # without asking where the base is
        with as_policy_error(f"the tokenizer in {folder}"):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trained.policy.trust_remote_code
            )
            return found
    return trained.policy.load_tokenizer()


@contextmanager
def quiet() -> Iterator[None]:
    """Let our lines through to the standard error, and none that a user can do nothing about, nor bars of others."""
    from transformers.utils import logging as theirs

    from lit_dpo.quiet import Hush

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("lit_dpo").setLevel(logging.INFO)
    hush, bars = Hush(), theirs.is_progress_bar_enabled()
    hush.begin()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        hush.end()
        if bars:
            theirs.enable_progress_bar()


def shown(place: hub.Place) -> str:
    """Write a hub id with its commit, or a folder's name: not where on this machine it is."""
    return str(place) if place.commit is not None else Path(place.name).name
