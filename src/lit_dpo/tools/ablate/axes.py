"""What is varied: from `--vary KEY=V1,V2` and files to the arguments of each run."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lit_dpo.losses
import lit_dpo.references
from lit_dpo.aliases import repeats_endlessly
from lit_dpo.errors import AblationError
from lit_dpo.tools.ablate.records import Asked
from lit_dpo.tools.configs import folder

SHORT = {
    "loss": "model.loss",
    "beta": "model.loss.beta",
    "lr": "model.optimizer.lr",
    "reference": "model.reference",
}
"""Names for the options that are varied most."""

_PARTS = {"loss": (lit_dpo.losses, "losses"), "reference": (lit_dpo.references, "references")}
"""What a name of a class or of a shipped fragment may stand for: its module, and the folder in `configs`."""

_OPENING, _CLOSING = "[{(", "]})"
_LONGEST = 120
"""Of a folder's name, in characters."""


class Value(NamedTuple):
    """One value of an axis: as it is shown, and as an argument of `fit`."""

    label: str
    argument: str


class Axis(NamedTuple):
    """An option of `fit` and its values."""

    key: str
    values: list[Value]

    @property
    def option(self) -> str:
        """As `fit` knows it."""
        return SHORT.get(self.key, self.key)


def typed(text: str) -> Axis:
    """Read what was typed at `--vary`.

    Raises:
        AblationError: for a text that is not `KEY=V1,V2`, or values that are no loss and no reference.

    Example:
        >>> typed("beta=0.1,0.5")
        Axis(key='beta', values=[Value(label='0.1', argument='0.1'), Value(label='0.5', argument='0.5')])
        >>> [value.label for value in typed("model.policy.target_modules=[q_proj,v_proj],all-linear").values]
        ['[q_proj,v_proj]', 'all-linear']
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise AblationError(f"Expected `--vary KEY=V1,V2` but got {text!r}.")
    return axis(key.strip().removeprefix("--"), _split(values))


def axis(key: str, values: Sequence[Any]) -> Axis:
    """Make an axis of values, as they are typed or as they are in a file.

    Raises:
        AblationError: for none, for two that are shown alike, or for a name that stands for nothing.
    """
    key = next((short for short, option in SHORT.items() if option == key), key)
    if not values:
        raise AblationError(f"Expected values of `{key}` but got none.")
    found = [_value(key, one) for one in values]
    labels = [one.label for one in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise AblationError(f"Expected values of `{key}` that differ but {twice} is there twice: give them labels.")
    return Axis(key, found)


def from_file(path: Path) -> tuple[list[Axis], list[int] | None]:
    """Read axes from YAML: a mapping from option to values; `seeds` are those of the runs.

    Raises:
        AblationError: for a file that is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = None if (endless := repeats_endlessly(text)) else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AblationError(f"Cannot read the axes in {path}: {error}") from error
    if endless:
        raise AblationError(f"Cannot read the axes in {path}: its aliases (`*name`) repeat without end.")
    if not isinstance(content, Mapping) or not all(isinstance(one, list) for one in content.values()):
        raise AblationError(f"Expected {path} to map options to lists of values, such as `beta: [0.1, 0.5]`.")
    seeds = content.get("seeds")
    if seeds is not None:
        seeds = read_seeds(seeds)
    return [axis(str(key), values) for key, values in content.items() if key != "seeds"], seeds


def read_seeds(given: str | Sequence[Any]) -> list[int]:
    """Read seeds: `1,2`, or a list.

    Raises:
        AblationError: for one that is no whole number from 0 on, or is there twice.
    """
    texts = [one.strip() for one in given.split(",")] if isinstance(given, str) else [str(one) for one in given]
    if not texts or not all(one.isdigit() for one in texts) or len({int(one) for one in texts}) < len(texts):
        raise AblationError(f"Expected seeds that differ, whole numbers from 0 on, such as 1,2,3, but got {given}.")
    return [int(one) for one in texts]


def grid(axes: Sequence[Axis], seeds: Sequence[int], base: Sequence[str], *, of_data: bool) -> list[Asked]:
    """Every combination of values, with every seed.

    Args:
        axes: what is varied.
        seeds: of the adapters that a run starts from, and of dropout.
        base: arguments of `fit` that are common to all runs.
        of_data: whether a seed is also that of the order of the data.

    Raises:
        AblationError: for an option that is there twice.
    """
    options = [one.option for one in axes]
    if twice := next((option for option in options if options.count(option) > 1), None):
        raise AblationError(f"Expected each option once but `{twice}` is varied twice: put its values together.")
    # a class first, then what is within it
    order = sorted(range(len(axes)), key=lambda place: options[place].count("."))
    asked = []
    for values in itertools.product(*(one.values for one in axes)):
        labels = {one.key: value.label for one, value in zip(axes, values, strict=True)}
        given = [f"--{options[place]}={values[place].argument}" for place in order]
        for seed in seeds:
            seeded = [f"--seed_everything={seed}", *([f"--data.seed={seed}"] if of_data else [])]
            asked.append(Asked(name_of(labels, seed), labels, seed, [*base, *given, *seeded]))
    return asked


def name_of(labels: Mapping[str, str], seed: int) -> str:
    """Name a run's folder.

    Example:
        >>> name_of({"loss": "ipo", "beta": "0.1"}, 1)
        'loss=ipo,beta=0.1,seed=1'
    """
    whole = ",".join([*(f"{key}={label}" for key, label in labels.items()), f"seed={seed}"])
    name = re.sub(r"[^\w.,=+@ -]", "-", whole)
    if name == whole and len(name) <= _LONGEST:
        return name
    # what was changed or cut may have told two runs apart
    return f"{name[:_LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def near(word: str, known: Sequence[str]) -> str:
    """Name the nearest ones, as the end of a sentence."""
    folded = {one.lower(): one for one in known}
    found = [folded[one] for one in difflib.get_close_matches(word.lower(), list(folded), n=3, cutoff=0.6)]
    return f" Near it: {', '.join(found)}." if found else ""


def _value(key: str, given: Any) -> Value:
    label = None
    if isinstance(given, Mapping):
        given = dict(given)
        label = given.pop("label", None)
        if label is None and "class_path" in given:
            label = str(given["class_path"]).rpartition(".")[2]
        if label is None:
            raise AblationError(f"Expected a `label` in each value of `{key}` that is a mapping.")
        if given.keys() == {"value"}:
            given = given["value"]
    if key in _PARTS and isinstance(given, str):
        name, argument = _part(key, given)
        return Value(label or name, argument)
    if isinstance(given, str):
        return Value(label or given, given)
    if isinstance(given, bool) or given is None or isinstance(given, Mapping | list):
        text = json.dumps(given)
        return Value(label or text, text)
    return Value(label or str(given), str(given))


def _part(key: str, given: str) -> tuple[str, str]:
    """Find what a name of a loss or a reference stands for: how it is shown, and the argument."""
    module, where = _PARTS[key]
    fragments = {file.stem: file for file in (folder() / where).glob("*.yaml")}
    if given in fragments:
        return given, str(fragments[given])
    if given.endswith((".yaml", ".yml")):
        if not Path(given).is_file():
            raise AblationError(f"Expected a file of a {key} but there is no {given}.")
        return Path(given).stem, given
    name = given.rpartition(".")[2]
    if "." in given or name in module.__all__:
        return name, given
    raise AblationError(
        f"Expected a {key} but got {given!r}: a fragment (`lit-dpo configs` lists them), a file, or a class path."
        f"{near(given, [*fragments, *module.__all__])}"
    )


def _split(text: str) -> list[str]:
    """Split at the commas that are in no brackets and in no quotes."""
    found, depth, quote = [""], 0, ""
    for one in text:
        if quote:
            quote = "" if one == quote else quote
        elif one in "'\"":
            quote = one
        elif one in _OPENING:
            depth += 1
        elif one in _CLOSING:
            depth -= 1
        if one == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += one
    return [one.strip() for one in found if one.strip()]
