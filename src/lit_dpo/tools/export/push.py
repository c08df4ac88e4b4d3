"""`--push`: a folder to a repository of the hub, and what its refusals mean."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from lit_dpo.errors import LitDPOError

log = logging.getLogger(__name__)

_LOG_IN = "log in with an account that may write there (`hf auth login`, or HF_TOKEN)"


def check_push(name: str) -> None:
    """Find what would fail after the work is done: a wrong name, no token, no network allowed.

    Raises:
        LitDPOError: saying what to do.
    """
    from huggingface_hub import constants, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", name, re.ASCII):
        raise LitDPOError(f"Expected `--push` as organisation/name but got {name!r}.")
    if constants.HF_HUB_OFFLINE:
        raise LitDPOError("`--push` needs the hub, and HF_HUB_OFFLINE forbids to ask it: unset that.")
    if get_token() is None:
        raise LitDPOError(f"`--push` needs a token, and there is none: {_LOG_IN}.")


def push(folder: Path, name: str, *, private: bool, existing: bool) -> str:
    """Upload a folder as one commit; the address of it.

    Args:
        folder: what is uploaded, whole.
        name: `organisation/name`.
        private: whether a new repository is private.
        existing: whether a repository that is there gets the commit; else it is refused.

    Raises:
        LitDPOError: for whatever the hub refuses, or no network. The folder stays, and is uploaded by what it says.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not existing or not api.repo_exists(name):
            api.create_repo(name, private=private, exist_ok=False)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload what lit_dpo exported")
    except Exception as error:  # errors of the hub and of HTTP libraries have no common base
        raise LitDPOError(
            f"`--push`: {name} {_explained(error)} {folder} is written and stays: `hf upload {name} {folder}` uploads "
            "it later."
        ) from error
    return str(getattr(done, "commit_url", done))


def _explained(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    from lit_dpo.hub import explain

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return f"was refused, for the token is not valid: {_LOG_IN}."
    if status == 403:
        return f"was refused, for this token may not write there: {_LOG_IN}."
    if status == 409:
        return "is there already: name another one, or add a commit to it with `--push_to_existing`."
    if status is not None:
        return f"was refused: the hub says {str(error).strip().splitlines()[0]}."
    found = explain(error, "it", None) or f"could not be written: {type(error).__name__}: {error}."
    return found.replace("Run the same command again; what has arrived is kept.", "").strip()
