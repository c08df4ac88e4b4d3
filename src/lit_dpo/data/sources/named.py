"""Data sets of the Hugging Face hub, and folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_dpo.aliases import repeats_endlessly
from lit_dpo.data.digests import content_digest
from lit_dpo.data.sources.base import RowSource, cache_of, typed
from lit_dpo.data.sources.files import TEXT, load_file, suffix_of
from lit_dpo.data.sources.text import check_packed
from lit_dpo.errors import DataError, first_line
from lit_dpo.hub import ABSENT, GATED, explain, split_revision

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


class _Named(NamedTuple):
    """A hub data set or a folder: `path@revision:configuration:split`, of which only the path has to be there."""

    path: str
    revision: str | None
    configuration: str | None
    split: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return ":".join([self.path + at, *filter(None, (self.configuration, self.split))])


def _parse(name: str) -> _Named:
    """Split a name at its colon; a part of a split, `train[:100]`, has one of its own."""
    place, _, rest = name.partition(":")
    path, revision = split_revision(place)
    parts = re.fullmatch(r"(?:([^:\[\]]+):)?(.*)", rest)
    configuration, split = parts.groups() if parts else (None, rest)
    return _Named(path, revision, configuration, split or None)


def load_named(name: str, encoding: str | None) -> list[RowSource]:
    """Load a data set of the hub, or a folder; of a folder of text files a source per file.

    Raises:
        DataError: if it does not exist, may not be read, or a configuration or split has to be chosen.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    named = _parse(name)
    _refuse_paths(name, named.path)
    folder, content, options = Path(named.path).expanduser(), "", {}
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        _check_inside(folder, files)
        content = content_digest(files)
        if any((folder / marker).is_file() for marker in _SAVED):
            return [_saved(named, folder, content)]
        options = {"cache_dir": str(cache_of(content))}
    try:
        _check_card(named)
        named = _completed(named)
        if folder.is_dir() and (found := _text_files(named, unpacked=True)):
            sources = [(file.name, load_file(file, encoding)) for file in found]
            return [
                source._replace(name=f"{named}, {file}" if len(found) > 1 else str(named)) for file, source in sources
            ]
        rows = load_dataset(named.path, named.configuration, split=named.split, revision=named.revision, **options)
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors have no common base
        what = explain(error, named.path, named.revision, "dataset")
        if what is None and isinstance(error, DatasetNotFoundError):  # raised without its cause
            what = GATED if "gated" in str(error) else ABSENT
        raise DataError(
            f"`{name}`: {named.path} {what}"
            if what
            else f"`{name}` cannot be loaded: no local file with a known suffix, and `datasets` says: {error}"
        ) from error
    return [typed(str(named), rows, content and f"{content} {named.configuration} {named.split}")]


def stream_named(name: str) -> tuple[str, Callable[[], Iterable[Any]]]:
    """Return the full name of a data set of the hub, or of a folder, and what begins to read it, row by row.

    Raises:
        DataError: as `load_named`.
    """
    from datasets import load_dataset

    named = _parse(name)
    _refuse_paths(name, named.path)
    try:
        if (folder := Path(named.path).expanduser()).is_dir():
            _check_inside(folder, [file for file in folder.rglob("*") if file.is_file()])
        _check_card(named)
        named = _completed(named)
        if folder.is_dir():
            _text_files(named)  # what it names is in it
        found = load_dataset(
            named.path, named.configuration, split=named.split, revision=named.revision, streaming=True
        )
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors have no common base
        what = explain(error, named.path, named.revision, "dataset") or f"cannot be streamed: {first_line(error)}"
        raise DataError(f"`{name}`: {named.path} {what}") from error
    return str(named), partial(iter, found)


def _text_files(named: _Named, *, unpacked: bool = False) -> list[Path]:
    """List the files of a folder's split, if it has nothing but text files, and no options for reading them.

    Others are read by `datasets`, which unpacks whatever is packed: `unpacked`, onto the disk, and whole.
    """
    from datasets import load_dataset_builder

    config = load_dataset_builder(named.path, named.configuration).config
    everything = [Path(file) for files in (config.data_files or {}).values() for file in files]
    _check_inside(Path(named.path).expanduser(), everything)
    plain = type(config)(name=config.name, data_dir=config.data_dir, data_files=config.data_files)
    files = [Path(file) for file in (config.data_files or {}).get(named.split, ())]
    if config == plain and all(suffix_of(file) in TEXT for file in files):
        return files
    for file in everything:
        check_packed(file, whole=unpacked)
    return []


def _check_card(named: _Named) -> None:
    """See that what `datasets` walks through before it reads a row has an end.

    Raises:
        DataError: naming the file.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for name, text in _cards(named):
        block = REGEX_YAML_BLOCK.search(text) if name.endswith(".md") else None
        if repeats_endlessly(block.group(2) if block else text):
            raise DataError(f"`{named.path}/{name}` cannot be read: its aliases (`*name`) repeat without end.")


def _cards(named: _Named) -> Iterator[tuple[str, str]]:
    """Yield the descriptions that a folder has, or the commit of a data set of the hub, by name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = Path(named.path).expanduser()
    for name in ("README.md", ".huggingface.yaml"):
        file = folder / name
        if not folder.is_dir():
            try:
                file = Path(hf_hub_download(named.path, name, repo_type="dataset", revision=named.revision))
            except LocalEntryNotFoundError:  # no network: `datasets` reads what it has made of it before, or says so
                return
            except EntryNotFoundError:
                continue
        if file.is_file():
            yield name, file.read_bytes().decode("utf-8", "replace")


def _check_inside(folder: Path, files: Iterable[Any]) -> None:
    """See that what a folder has and names is in it, or, of a commit in the hub's cache, among the cache's files.

    Raises:
        DataError: naming the first that is elsewhere.
    """
    place = folder.resolve()
    for file in files:
        found = Path(file).resolve()
        if "://" in str(file) or not (found.is_relative_to(place) or found.parent == place.parent.parent / "blobs"):
            raise DataError(
                f"`{folder}` names `{file}`, which is outside of it: give that by its own name if it is meant."
            )


def _saved(named: _Named, folder: Path, content: str) -> RowSource:
    """Open what `save_to_disk` wrote: a table, or one for each split."""
    from datasets import DatasetDict, load_from_disk

    try:
        for state in folder.rglob("state.json"):
            lists = (one for one in json.loads(state.read_text(encoding="utf-8")).values() if isinstance(one, list))
            names = [one["filename"] for files in lists for one in files if isinstance(one, dict) and "filename" in one]
            _check_inside(state.parent, [state.parent / name for name in names])
        if (splits := folder / "dataset_dict.json").is_file():
            _check_inside(folder, [folder / one for one in json.loads(splits.read_text(encoding="utf-8"))["splits"]])
        found = load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # `datasets` and pyarrow, of many kinds
        raise DataError(f"`{folder}` cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(found, DatasetDict):
        split = named.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            came = f" but got `{split}`" if split else ""
            raise DataError(
                f"Expected a split, such as `{named._replace(split=next(iter(found), 'train'))}`{came}; "
                f"`{folder}` has {', '.join(map(str, found)) or 'none'}."
            )
        return typed(str(named._replace(split=split)), found[split], f"{content} {split}")
    if named.split:
        raise DataError(f"`{folder}` is one table, without splits: name it `{folder}`.")
    return typed(str(named), found, content)


def _completed(named: _Named) -> _Named:
    """With the configuration and the split, if there is only one; from the cache where the hub may not be asked.

    Raises:
        DataError: for one that has to be chosen, or does not exist, with those there are.
    """
    from datasets import config, get_dataset_config_names, get_dataset_split_names

    if config.HF_HUB_OFFLINE and named.split and not Path(named.path).is_dir():
        return named  # `datasets` finds what it has loaded before, and lists nothing
    configurations = get_dataset_config_names(named.path, revision=named.revision)
    if named.configuration is None and "default" not in configurations and len(configurations) > 1:
        # the one name that was given may be the configuration
        given = (named.split, "train") if named.split in configurations else (configurations[0], named.split or "train")
        example = named._replace(configuration=given[0], split=given[1])
        raise DataError(
            f"Expected a configuration, such as `{example}`; `{named.path}` has {', '.join(configurations)}."
        )
    if named.configuration not in (None, *configurations):
        raise DataError(
            f"`{named.path}` has no configuration `{named.configuration}`; it has {', '.join(configurations)}."
        )
    if named.split is not None and not re.fullmatch(r"\w+", named.split):
        return named  # an expression
    splits = get_dataset_split_names(named.path, named.configuration, revision=named.revision)
    if named.split is None and len(splits) > 1:
        raise DataError(
            f"Expected a split, such as `{named._replace(split=splits[0])}`; `{named.path}` has {', '.join(splits)}."
        )
    if named.split not in (None, *splits):
        raise DataError(f"`{named.path}` has no split `{named.split}`; it has {', '.join(splits)}.")
    return named._replace(split=named.split or splits[0])


def _refuse_paths(name: str, path: str) -> None:
    """Refuse a path that does not exist: it is never looked up on the hub."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_like_path and not Path(path).expanduser().is_dir():
        raise DataError(f"File not found: `{Path(name).expanduser().absolute()}`.")
