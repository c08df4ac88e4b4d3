"""What was meant by a mistake in the arguments: jsonargparse's pages of text in, one or two lines out."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from lit_dpo.config_files import dotted_values, file_with, files_of
from lit_dpo.names import did_you_mean, nearest
from lit_dpo.shipped import files, folder

# jsonargparse's wordings; a message of another wording is shown as it is
_KEYS = re.compile(r'Parser key "([\w.]+)"')
_CLASSES = re.compile(r"Problem with given class_path '([\w.]+)'")
_OPTION = re.compile(r"Option '([\w.]+)' is not accepted")
_UNKNOWN_KEY = re.compile(r"does not accept option '([\w.-]+)'")
_UNKNOWN = re.compile(r"^unrecognized arguments: (.*)", re.DOTALL)
_CLASS = re.compile(r"(?:dot import path string|import path format): ([^\s]+)|has no attribute '(\w+)'")
_FILE = re.compile(r"Expected a path but (\S+\.ya?ml) |File does not exist: '(.+?)'")
_CHOICES = re.compile(r"typing\.Literal\[(.*?)\]")
_VALUE = re.compile(r"(?:Given value|Got value): ['\"]?(.*?)['\"]?(?:\. Got value: .*)?$", re.MULTILINE)
_TYPES = re.compile(r"Expected a <class '([\w.]+)'>")
_SEVERAL = re.compile(r"Multiple subclasses with name ([\w.]+)\. .*: (.+?)\.?$", re.MULTILINE)
_OF_CALLABLE = "expects a function or a callable class: Parser key"  # what follows is of an argument of it
_LOOP = re.compile(r"Config file loop detected: .* -> (.+)")
_ANCHORS = "A key that only holds an anchor starts with `x-`."

# What other packages call it.
_ELSEWHERE = {"rank": "r", "lora_r": "r", "lora_rank": "r", "learning_rate": "lr", "epochs": "max_epochs"}
_TOP = ("seed_everything", "config", "print_config", "ckpt_path", "model", "data", "trainer", "verbose", "weights_only")


class Mistake(NamedTuple):
    """What a message of jsonargparse says, and what was typed."""

    message: str
    typed: Sequence[str]

    @property
    def keys(self) -> list[str]:
        """From the outermost class in, such as `model`, `policy`, `r`."""
        return ".".join(dict.fromkeys(_KEYS.findall(self.message))).split(".")

    @property
    def classes(self) -> list[str]:
        """Class paths, from the outermost in."""
        return list(dict.fromkeys(_CLASSES.findall(self.message)))


def explain(message: str, typed: Sequence[str], load: Callable[[str], Any]) -> str | None:
    """Say in one or two lines what is wrong and what may be meant; None for a message of no known kind.

    Args:
        message: jsonargparse's.
        typed: the command line.
        load: a class by its path.
    """
    mistake = Mistake(message, typed)
    if message.startswith("Problems parsing config"):
        return _no_yaml(mistake)
    for look in (_unknown_option, _unknown_key, _missing_file, _bad_fragment):
        if (found := look(mistake, load)) is not None:
            return found
    for look in (_unknown_argument, _wrong_value):
        if "required" not in message and _KEYS.search(message) and (found := look(mistake, load)) is not None:
            return found
    return None


def _no_yaml(mistake: Mistake) -> str | None:
    for path in files_of(mistake.typed):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            return f"{path}: {line}Expected YAML, but {error.problem}."
        except yaml.reader.ReaderError as error:  # it has no line
            return f"{path}: Expected YAML, but it holds the control character U+{error.character:04X}."
    return None


def _unknown_option(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    if not (found := _UNKNOWN.match(mistake.message)):
        return None
    first = found[1].split()[0]
    if not first.startswith("--"):
        return f"Expected an option, which starts with --, but got {first!r}."
    option = first.partition("=")[0]
    return f"There is no option `{option}`{_meant(option[2:], load)}"


def _unknown_key(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    if not (found := _UNKNOWN_KEY.search(mistake.message)):
        return None
    key = found[1]
    first = next((part for part in key.split(".") if part not in _TOP), key)
    place = file_with(first, mistake.typed)
    begin = f"{place[0]}: there is" if place else "There is"
    return f"{begin} no key `{key}`{_meant(key, load, '')}\n{_ANCHORS}"


def _missing_file(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    if not (found := _FILE.search(mistake.message)):
        return None
    name = found[1] or found[2]
    path = Path(name)
    there = {str(path.with_name(one.name)): one for one in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
    if not there:
        there = {str(Path("configs", one.relative_to(folder()))): one for one in files()}
    guess = did_you_mean(_short(one) for one in nearest(name, there) or nearest(_short(name), there))
    return f"There is no file {_short(name)}{guess or ': `lit-dpo configs` lists those that come along.'}"


def _short(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _bad_fragment(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    """Look what is wrong in a fragment: one that is refused is tried as a name, and then is said to be a loop."""
    if not (found := _LOOP.search(mistake.message)) or not Path(found[1]).is_file():
        return None
    content = yaml.safe_load(Path(found[1]).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return f"{found[1]}: Expected a class by `class_path` and `init_args`, but it holds no keys."
    bases = _expected(mistake, load)[0]
    of = next((one for one in _all(bases) if one.__name__ == str(content.get("class_path")).rpartition(".")[2]), None)
    if of is None:
        return f"{found[1]}: {_no_class(str(content.get('class_path')), bases, ())}"
    given = content.get("init_args") or {}
    said = (
        _no_argument(of, name, name, "") if name not in arguments(of) else _refused(of, given, name) for name in given
    )
    wrong = next(filter(None, said), None)
    return None if wrong is None else f"{found[1]}: {wrong}"


def _refused(of: type, given: dict[str, Any], name: str) -> str | None:
    """Say what a class has against the value of an argument that it has, if the value is plain."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(of, fail_untyped=False)
    try:
        parser.parse_object({name: given[name]}, defaults=False, with_meta=False)
    except ArgumentError as error:
        said = _wrong_value(Mistake(str(error), ()), lambda _: None)
        return said and said.replace(f"`--{name}`", f"`{name}`")
    return None


def _unknown_argument(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    if not (found := _OPTION.search(mistake.message)):
        return None
    name, keys = found[1], mistake.keys
    of = load(mistake.classes[-1]) if mistake.classes else None
    if "expects a function or a callable class" in mistake.message:  # an optimizer or a scheduler
        path = re.search(r"class_path='([\w.]+)'", mistake.message)
        of = load(path[1]) if path else None
    if not isinstance(of, type):
        return None
    full = ".".join([*keys, name])
    if not any(one.startswith(f"--{full}") for one in mistake.typed) and (place := file_with(name, mistake.typed)):
        return f"{place[0]}: {_no_argument(of, name, place[1].removeprefix('init_args.'), '')}"
    return _no_argument(of, name, f"--{full}", f"--{'.'.join(keys)}.")


def _no_argument(of: type, name: str, shown: str, before: str) -> str:
    there = arguments(of)
    likely = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in there else nearest(name, there)
    guess = did_you_mean(f"`{before}{one}`" for one in likely)
    return f"{of.__name__} has no argument `{shown}`" + (guess or f": it has {', '.join(sorted(there)) or 'none'}.")


def _wrong_value(mistake: Mistake, load: Callable[[str], Any]) -> str | None:
    """Explain a class, a choice or a number that is none."""
    option = f"--{'.'.join(mistake.keys)}"
    if several := _SEVERAL.search(mistake.message):
        paths = " or ".join(several[2].split(", "))
        return f"`{option}`: Expected one class but there are several {several[1]}: name it {paths}."
    message = mistake.message[max(0, mistake.message.rfind(_OF_CALLABLE)) :]
    value = next((one for one in _VALUE.findall(message) if one), "")
    classes, choices = _expected(mistake, load)
    if (named := _CLASS.search(mistake.message)) and (classes or choices):
        name = named[1] or named[2]
        place = None if any(name in one for one in mistake.typed) else file_with(name, mistake.typed, dotted_values)
        return f"{place[0] if place else f'`{option}`'}: {_no_class(name, classes, choices)}"
    found = (one.strip(" '\"") for found in _CHOICES.findall(message) for one in found.split(","))
    if written := [*dict.fromkeys(found)]:
        guess = did_you_mean(nearest(value, written)) or "."
        return f"Expected `{option}` to be one of {', '.join(written)} but got {value}{guess}"
    if wanted := " or ".join(one for one in dict.fromkeys(_TYPES.findall(message)) if one != "NoneType"):
        return f"Expected `{option}` to be {wanted} but got {value or 'something else'}."
    return None


def _no_class(name: str, bases: Sequence[type], choices: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    known = [*choices, *(one.__name__ for one in _all(bases) if not inspect.isabstract(one))]
    wanted = " or ".join([*([f"one of {', '.join(choices)}"] if choices else []), *_subclass(bases)])
    return f"Expected {wanted} but got {name}{did_you_mean(nearest(last, known)) or '.'}"


def _subclass(bases: Sequence[type]) -> list[str]:
    return [f"a subclass of {bases[0].__name__}"] if bases else []


# ---- what there is ----


@functools.cache
def arguments(of: type) -> frozenset[str]:
    """Name the arguments of a class as the command knows them."""
    return frozenset(
        name.partition(".")[0] for name in LightningArgumentParser().add_class_arguments(of, fail_untyped=False)
    )


def _all(bases: Sequence[type]) -> Iterator[type]:
    """List the classes and what is imported of their subclasses, but for private ones."""
    seen, todo = set(), list(bases)
    while todo:
        one = todo.pop(0)
        if one in seen:
            continue
        seen.add(one)
        todo += one.__subclasses__()
        if not one.__name__.startswith("_") and "<locals>" not in one.__qualname__:  # what can be named
            yield one


def _expected(mistake: Mistake, load: Callable[[str], Any]) -> tuple[list[type], list[str]]:
    """Say what a parameter may hold: subclasses of these, or one of some words."""
    *outer, name = mistake.keys
    if not outer:
        tops: dict[str, list[type]] = {"model": [pl.LightningModule], "data": [pl.LightningDataModule]}
        return tops.get(name, []), []
    of = load(mistake.classes[-1]) if mistake.classes else pl.Trainer if outer == ["trainer"] else None
    for base in inspect.getmro(of) if isinstance(of, type) else ():
        hints = _hints(base)
        if name in hints:
            return _parts(hints[name])
    return [], []


def _hints(of: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given in (of, inspect.unwrap(of.__init__)):  # type: ignore[misc]
        try:
            found |= typing.get_type_hints(given)
        except (NameError, TypeError, AttributeError):
            continue
    return found


def _parts(hint: Any) -> tuple[list[type], list[str]]:
    """Take the classes and the words out of an annotation; of a callable, those of what it returns."""
    if get_origin(hint) is Literal:
        return [], [str(one) for one in get_args(hint)]
    inner = get_args(hint)
    if not inner:
        plain = isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "datetime", "typing")
        return ([hint] if plain else []), []
    if get_origin(hint) is Callable:
        inner = inner[-1:]
    both = [_parts(one) for one in inner]
    return [one for classes, _ in both for one in classes], [one for _, choices in both for one in choices]


def _meant(key: str, load: Callable[[str], Any], dashes: str = "--") -> str:
    """Find the nearest option to a dotted one, part by part; one without dots may be the end of another."""
    first, *rest = key.split(".")
    tops = nearest(first, _TOP, 1) if first not in _TOP else [first]
    if not tops:
        ends = [name for name in _paths() if name.rpartition(".")[2] == _ELSEWHERE.get(key, key)]
        likely = ends or nearest(key, _paths())
        return did_you_mean(f"`{dashes}{one}`" for one in likely[:3]) or ": `--print_config` shows what there is."
    if not rest:
        return did_you_mean(f"`{dashes}{one}`" for one in tops)
    of = {"trainer": pl.Trainer, "model": _module(), "data": _data()}.get(tops[0])
    known = arguments(of) if of else frozenset()
    seconds = [rest[0]] if rest[0] in known else nearest(rest[0], known)
    likely = [".".join([tops[0], second, *rest[1:]]) for second in seconds]
    return did_you_mean(f"`{dashes}{one}`" for one in likely) or ": `--print_config` shows what there is."


def _module() -> type:
    from lit_dpo.module import DPOModule

    return DPOModule


def _data() -> type:
    from lit_dpo.data.datamodule import PreferenceDataModule

    return PreferenceDataModule


@functools.cache
def _paths() -> tuple[str, ...]:
    """List the options that most people may mean by their last part alone."""
    import torch

    from lit_dpo.losses import DPOLoss
    from lit_dpo.policy import LoRAPolicy

    rooms = {
        "model": _module(),
        "data": _data(),
        "trainer": pl.Trainer,
        "model.loss": DPOLoss,
        "model.optimizer": torch.optim.AdamW,
        "model.policy": LoRAPolicy,
    }
    return tuple(f"{room}.{name}" for room, of in rooms.items() for name in sorted(arguments(of)))
