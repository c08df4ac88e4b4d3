"""How arguments and files become one configuration, without a number that nobody typed.

- A value holds for the class that it was typed for. Another class, named later and in whatever spelling, starts from
  its own defaults; a line says which typed values it does not take over. Naming the class that stands there already
  changes nothing.
- A model, a data class or a policy extends its base: it takes over what was typed for arguments that both classes have
  from their nearest common base, and nothing else.
- Nobody typed a default, so none is taken over, not by a subclass either. Defaults come last: those of the class, and
  where it is the very class of a parameter's default, those of that default (`DPOModule`'s AdamW has lr 1e-5).
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.aliases import repeats_endlessly
from lit_dpo.compat import on_another_class
from lit_dpo.config_files import files_without_end
from lit_dpo.errors import printable
from lit_dpo.mistakes import arguments, explain
from lit_dpo.policy import LoRAPolicy

_EXTENDED = (pl.LightningModule, pl.LightningDataModule, LoRAPolicy)
_PARTS = ("init_args", "dict_kwargs")
_ANCHORS = "x-"  # as in Compose files and OpenAPI
# two wordings of jsonargparse; a third would be shown as it is
_REQUIRED = re.compile(r'(?:the following arguments are required: |Key "(?=[\w.]+" is required))([\w.]+).*')
_KEYS = re.compile(r'Parser key "([\w.]+)"')
_FIRST = {"policy": "policy.model"}  # what is to be typed where a class is missing
_TYPED: ContextVar[list[str]] = ContextVar("typed", default=[])  # noqa: B039 - never changed in place
_ENDLESS = "Expected a configuration that can be read, but in {} aliases repeat without end."
_NOISE = ("Given value", "Expected a <class 'NoneType'>", "Union subtypes", "Subtypes:", "Errors:")


class Parser(LightningArgumentParser):
    """Keeps what was typed apart from defaults, and ends with the sentence that matters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # `--trainer.max_epoch` is a mistake; another release may give it another meaning

    is_command = False
    """True for the parser of a whole command, such as `fit`; the others parse the arguments of one class."""

    defaults_below: Callable[[Namespace], Mapping[str, Any]] | None = None
    """More defaults of a command, by name; it is given what was typed, without any default."""

    def parse_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: Namespace | None = None,
        env: bool | None = None,
        defaults: bool = True,
        **kwargs: Any,
    ) -> Namespace:
        """First all that was typed, then the defaults below it."""
        if _TYPED.get():  # a parser within another: of a command, or of a class
            return self._parse_typed(args, namespace, env, defaults, **kwargs)
        token = _TYPED.set(list(sys.argv[1:] if args is None else args))
        try:
            if endless := next(files_without_end(_TYPED.get()), None):
                refuse(_ENDLESS.format(endless))
            return self._parse_typed(args, namespace, env, defaults, **kwargs)
        except UnicodeDecodeError as error:
            refuse(f"Expected a configuration file in UTF-8 but: {error}.")
        except RecursionError:
            refuse("Expected a configuration file that can be read, but it is nested too deep.")
        finally:
            _TYPED.reset(token)

    def _parse_typed(self, args: Any, namespace: Any, env: Any, defaults: bool, **kwargs: Any) -> Namespace:
        if not (self.is_command and defaults):
            return super().parse_args(args, namespace, env, defaults, **kwargs)
        said: dict[str, None] = {}  # in order, and each once
        with _on_another_class(lambda before, after: said.update(_drop_typed(before, after))):
            typed = super().parse_args(args, namespace, env, False, **kwargs)
        for line in said:
            rank_zero_info(line)
        if self.defaults_below is not None:
            self.set_defaults(dict(self.defaults_below(typed)))
        with _on_another_class(_drop_all):
            return super().parse_args([], typed, False, True, **kwargs)

    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        """Read a file, without the keys that only hold anchors: they start with `x-`."""
        content: Namespace = super().parse_string(*args, **kwargs)
        for name in [name for name in vars(content) if name.startswith(_ANCHORS)]:
            delattr(content, name)
        return content

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Without a page of usage above it and the whole configuration below it."""
        if not self.exit_on_error:  # jsonargparse is only trying something
            super().error(message, ex)
        refuse(explain(message, _TYPED.get(), _load) or _no_value(message, _TYPED.get()) or message)


def _no_value(message: str, typed: Sequence[str]) -> str | None:
    """Name the option as it was typed: of `--model.loss.beta` the parser has `--model`."""
    if not message.endswith("expected one argument"):
        return None
    for option, after in zip(typed, [*typed[1:], "--"], strict=True):
        if option.startswith("--") and "=" not in option and after.startswith("--"):
            return f"Expected a value after `{option}`."
    return None


def refuse(message: str) -> NoReturn:
    """End the program: a mistake in the arguments."""
    *_, required = ["", *_REQUIRED.findall(message)]
    required = _FIRST.get(required, required)
    if keys := _KEYS.findall(message):  # as an option, from the outermost class in
        message = _REQUIRED.sub(f"Expected `--{'.'.join([*keys, required])}` but it was not given.", message)
        message = message[max(0, message.find("Expected `--")) :]
    wanted = [line.strip().removeprefix("- ") for line in message.splitlines() if not any(n in line for n in _NOISE)]
    sys.stderr.write(printable("lit-dpo: error: " + "\n".join(line for line in wanted if line) + "\n"))
    raise SystemExit(2)


_read_yaml = get_loader("yaml")


def _read_bounded(text: str) -> Any:
    """Read what a file of any name holds, or what was typed: one that repeats itself is walked through by nobody."""
    if repeats_endlessly(text):
        if _TYPED.get():
            refuse(_ENDLESS.format("a file that is no `.yaml`, or in what was typed,"))
        raise yaml.YAMLError("Aliases repeat without end.")
    return _read_yaml(text)


set_loader("yaml", _read_bounded, (yaml.YAMLError,))


def _on_another_class(drop: Callable[[Namespace, str], Any]) -> AbstractContextManager[None]:
    """Within it, `drop(before, after)` takes from a class's entry what one of path `after` shall not have."""

    def discard(_: Any, before: Any, after: Any) -> None:
        if before and _load(before["class_path"]) is not _load(after["class_path"]):
            drop(before, after["class_path"])

    return on_another_class(discard)


def _drop_all(before: Namespace, _: str) -> None:
    for part in _PARTS:
        before.pop(part, None)


def _drop_typed(before: Namespace, after: str) -> dict[str, None]:
    """Drop it, and give the line that says so."""
    shared = _shared_arguments(_load(before["class_path"]), _load(after))
    dropped = []
    for part in _PARTS:
        values = before.get(part) or {}
        for name in list(values.as_dict() if isinstance(values, Namespace) else values):
            if name not in shared:
                dropped.append(_show(name, values.pop(name)))
    if not dropped:
        return {}
    old, new = (path.rpartition(".")[2] for path in (before["class_path"], after))
    return {f"{new} has its own defaults: dropped {', '.join(dropped)}, given for {old}": None}


def _shared_arguments(old: object, new: object) -> set[str]:
    """Name what a model, data or policy class takes over from another: arguments that their nearest base has."""
    if not isinstance(old, type) or not isinstance(new, type):
        return set()
    base: Any = next(base for base in new.__mro__ if issubclass(old, base))
    if not issubclass(base, _EXTENDED):
        return set()
    return {*(arguments(base) & arguments(old) & arguments(new))}


def _load(class_path: str) -> Any:
    """Import the class, whichever of its paths is given."""
    try:
        return pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError, ValueError):
        return class_path


def _show(name: str, value: object) -> str:
    return f"{name}={value}" if isinstance(value, str | int | float | None) else name
