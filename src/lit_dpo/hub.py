"""Ids of the Hugging Face hub: which commit, which files, and what its errors mean.

An id is resolved once, to the folder of its commit in the cache; from there on everything is a directory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lit_dpo.errors import PolicyError

log = logging.getLogger(__name__)

# What is read besides weights: configuration, tokenizer, templates and code.
_SMALL = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.spm")
_ADAPTER = "adapter_model.safetensors"
_CONVERTED = ("SFconvertbot", "Adding `safetensors` variant of this model")  # whom and what transformers trusts, too

GATED = "is gated: accept its licence on its page, then log in with that account (`hf auth login`, or HF_TOKEN)."
ABSENT = (
    "is not on the hub, or is private: check the name, or log in with an account that may read it (`hf auth login`, or "
    "HF_TOKEN)."
)


class Place(NamedTuple):
    """Where a model or an adapter is.

    Attributes:
        folder: its files; of a hub id those that were needed so far.
        name: the hub id, or the absolute directory.
        commit: of a hub id.
        option: that named it, for messages.
    """

    folder: Path
    name: str
    commit: str | None
    option: str

    def __str__(self) -> str:
        return self.name if self.commit is None else f"{self.name} (commit {self.commit})"


def looks_like_id(name: str) -> bool:
    """`organisation/name`, and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def locate(name: str, revision: str | None, option: str, *, ask: bool = True) -> Place:
    """Find a directory, or what a hub id's commit has besides weights, downloaded unless the cache has it.

    Args:
        name: a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        option: that named it.
        ask: the hub, too, and not only its cache.

    Raises:
        PolicyError: if there is no such directory, repository or revision, or it may not be read: with what to do.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if revision is not None:
            raise PolicyError(
                f"A revision has no effect on a directory: leave {revision!r} out, `{option}` is {local.absolute()}."
            )
        return Place(local.resolve(), str(local.resolve()), None, option)
    if "@" in name and looks_like_id(name):
        raise PolicyError(
            f"Expected `{option}` without a revision but got {name!r}: give that in "
            f"`{option.partition('.')[0]}.revision`."
        )
    if not looks_like_id(name):
        raise PolicyError(f"Expected `{option}` to be a directory or a hub id, but there is no {name!r}.")
    folder = _snapshot(name, revision, option, [*_SMALL, "additional_chat_templates/*"], ask=ask)
    return Place(folder, name, folder.name, option)


def locate_adapter(name: str, option: str) -> Place:
    """Find a PEFT directory with its weights, or that of `organisation/name` or `organisation/name@revision`.

    Raises:
        PolicyError: as `locate`.
    """
    path, revision = split_revision(name)
    if not Path(path).expanduser().is_dir() and not looks_like_id(path):
        raise PolicyError(f"No adapter at `{option}` {path!r}: there is no such directory.")
    place = locate(path, revision, option)
    if place.commit is not None:
        _snapshot(place.name, place.commit, option, [_ADAPTER])
    return place


def split_revision(name: str) -> tuple[str, str | None]:
    """`organisation/name@revision` in two; a directory may have an @ in its name."""
    path, at, revision = name.partition("@")
    return (name, None) if not at or Path(name).expanduser().exists() else (path, revision)


def locate_weights(place: Place, revision: str | None) -> Place:
    """Find where a bot has converted a hub id's weights to safetensors, as transformers does, else the same.

    Args:
        place: of a model.
        revision: that was asked for; a conversion stands in for the main branch only.

    Raises:
        PolicyError: if there are neither safetensors nor a conversion.
    """
    if place.commit is None or has_weights(place.folder) or weight_names(place.folder) != ["model.safetensors"]:
        return place
    from huggingface_hub import HfApi

    with explained(place.option, place.name, place.commit):
        names = HfApi().list_repo_files(place.name, revision=place.commit)
        if "model.safetensors" in names or "config.json" not in names:
            return place
        author, title = _CONVERTED
        made = [
            one.git_reference
            for one in HfApi().get_repo_discussions(place.name, author=author, discussion_type="pull_request")
            if one.title == title and one.author == author and one.git_reference
        ]
    pickled = ", ".join(name for name in names if name.endswith((".bin", ".pt", ".pth"))) or ", ".join(names[:12])
    if not made or revision not in (None, "main"):
        there = f" The main branch has a conversion: revision {made[0]}." if made else ""
        raise PolicyError(
            f"Expected safetensors weights in {place} but it has only {pickled}, which can run code as it loads. "
            f"Convert it once: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…).{there}"
        )
    found = locate(place.name, made[0], place.option)
    log.info("%s has only %s: taking the safetensors of %s, commit %s", place.name, pickled, made[0], found.commit)
    return found


def weight_names(folder: Path) -> list[str]:
    """List the files that transformers loads: a repository may hold weights twice, a cache only some of them."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        return _index_names(index)
    return ["model.safetensors"]


def _index_names(index: Path) -> list[str]:
    """List the files that an index of weights names, of its folder alone.

    Raises:
        PolicyError: if it names one elsewhere, or is no index.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PolicyError(f"Expected an index of weights in {index} but it cannot be read: {error}.") from error
    for name in names:
        if not isinstance(name, str) or not _names_a_file(name):
            raise PolicyError(f"Expected {index} to name files of its folder but it names {name!r}.")
    return sorted(set(names))


def _names_a_file(name: str) -> bool:
    """Say if it names a file of a folder, in characters that UTF-8 has: JSON can hold half of a pair of surrogates."""
    whole = not any("\ud800" <= one <= "\udfff" for one in name)
    return whole and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def has_weights(folder: Path) -> bool:
    """All files of safetensors weights are there."""
    return all((folder / name).is_file() for name in weight_names(folder))


def fetch_weights(place: Place) -> None:
    """Download a hub id's weights, unless the cache has them.

    Raises:
        PolicyError: as `locate`; a file that came in part is continued the next time.
    """
    if place.commit is not None and not has_weights(place.folder):
        _snapshot(place.name, place.commit, place.option, weight_names(place.folder), bar=True)
        if not has_weights(place.folder):
            raise PolicyError(
                f"Expected safetensors weights in {place} but the cache lacks {', '.join(weight_names(place.folder))}. "
                "Unset HF_HUB_OFFLINE to download them."
            )


def listing(place: Place) -> str:
    """Say what a place holds, for a message."""
    names = [found.name for found in place.folder.iterdir()] if place.folder.is_dir() else []
    if place.commit is not None:
        from huggingface_hub import HfApi

        with suppress(Exception):  # the cache has a part of it
            names = HfApi().list_repo_files(place.name, revision=place.commit)
    return ", ".join(sorted(names)[:12]) or "nothing"


def same_files(one: Place, other: Place) -> bool:
    """Whether two hub ids have the same configuration and weights at their commits: the hub has their digests."""
    from huggingface_hub import HfApi

    def digests(place: Place) -> dict[str, Any]:
        found = HfApi().model_info(place.name, revision=place.commit, files_metadata=True).siblings or []
        kept = (file for file in found if file.rfilename == "config.json" or file.rfilename.endswith(".safetensors"))
        return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in kept}

    with explained(one.option, other.name, other.commit):
        return digests(one) == digests(other)


def _snapshot(
    name: str, revision: str | None, option: str, files: Sequence[str], *, bar: bool = False, ask: bool = True
) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not bar and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        with explained(option, name, revision):
            # 1.x asks for the files of a commit that it has, offline too
            cached = not ask or constants.HF_HUB_OFFLINE
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=cached))
    finally:
        if quiet:
            enable_progress_bars()


@contextmanager
def explained(option: str, name: str, revision: str | None) -> Iterator[None]:
    """Say what a hub refused and what to do, instead of where in a library.

    Raises:
        PolicyError: for whatever goes wrong inside.
    """
    try:
        yield
    except PolicyError:
        raise
    except Exception as error:  # errors of the hub, of HTTP libraries and of files have no common base
        what = explain(error, name, revision) or f"cannot be read: {type(error).__name__}: {_first_line(error)}"
        raise PolicyError(f"`{option}`: {name} {what}") from error


def explain(error: BaseException, name: str, revision: str | None, kind: str = "model") -> str | None:
    """Explain what an error of the hub, or one that it caused, means for a repository; None for any other error.

    Args:
        error: what was raised.
        name: the repository.
        revision: that was asked for.
        kind: `model` or `dataset`.
    """
    from huggingface_hub import constants, errors

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, errors.GatedRepoError):
            return GATED
        if isinstance(found, errors.RevisionNotFoundError):
            return f"has no revision {revision!r}{_revisions(name, kind)}."
        if isinstance(found, errors.RepositoryNotFoundError):
            return f"{ABSENT} There is no directory {Path(name).absolute()} either."
        if isinstance(found, errors.OfflineModeIsEnabled):
            return _uncached(name, revision)
        if isinstance(found, errors.HfHubHTTPError):
            return f"cannot be read: the hub says {_first_line(found)}"
        if isinstance(found, errors.LocalEntryNotFoundError) and found.__cause__ is None:
            return _uncached(name, revision)
        if _is_of_network(found):
            if constants.HF_HUB_OFFLINE:
                return _uncached(name, revision)
            return (
                f"did not come through: the connection to the hub failed ({type(found).__name__}: "
                f"{_first_line(found)}). Run the same command again; what has arrived is kept."
            )
        found = found.__cause__ or found.__context__
    return None


def _uncached(name: str, revision: str | None) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"is not in the cache{at}, or not all of it, and HF_HUB_OFFLINE forbids to ask the hub: unset that to download "
        f"it. There is no directory {Path(name).absolute()} either."
    )


def _is_of_network(error: BaseException) -> bool:
    """See whether an error is the network's: the HTTP library has been `requests`, `httpx` and `httpx2`."""
    library = type(error).__module__.partition(".")[0]
    return (
        library in ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp")
        or isinstance(error, ConnectionError | TimeoutError)
        or "Consistency check failed" in str(error)
    )


def _revisions(name: str, kind: str) -> str:
    from huggingface_hub import HfApi

    with suppress(Exception):  # it only would help
        refs = HfApi().list_repo_refs(name, repo_type=kind)
        return "; it has " + ", ".join([*(one.name for one in refs.branches), *(one.name for one in refs.tags)][:20])
    return ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
