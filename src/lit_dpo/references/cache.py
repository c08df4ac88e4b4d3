"""A reference that is computed once: its log-probs on disk, whatever the loss."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.data.digests import version
from lit_dpo.errors import PolicyError, TrainingError
from lit_dpo.logps.fields import Field
from lit_dpo.logps.records import SequenceLogps
from lit_dpo.logps.score import base_model
from lit_dpo.policy.kernels import kernels_of
from lit_dpo.policy.symmetry import agreed
from lit_dpo.references.adapter import NoReference, default_reference
from lit_dpo.references.base import Reference, attached, keep_attached
from lit_dpo.references.outdated import outdated
from lit_dpo.references.store import LogpStore
from lit_dpo.seals import key_of
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from peft import PeftModel

    from lit_dpo.policy import LoRAPolicy

_VERSION = 3  # of what is stored and of how log-probs are computed


@dataclass(frozen=True)
class CachedReference(Reference):
    """Another reference, whose log-probs are remembered on disk: one pass per completion, then none, in any later run.

    Filled as completions come by, so the first epoch costs nothing extra. What is stored depends on the reference alone
    (its weights, quantisation, adapter and dtype) and on the token ids of prompt and completion, not on the loss, β,
    learning rate, data file, batch, run, or on what a completion is compared with: an ablation over losses runs the
    reference once. Whatever changes the numbers (another base, tokenizer, template, truncation) finds nothing and
    computes. Several ranks and runs may share a directory. Damaged files are noticed, and what they held is computed
    again. Weights in a directory are read once at the start, about a second per gigabyte, to know them by their
    content; a hub id is known by its commit.

    Args:
        reference: what is remembered. None: the module's default, the base or the adapter that is continued.
        directory: where; a folder for each reference is made in it.
        per_token: store log-probs per token, 4 bytes each: the size of the encoded completions. False stores sums, 8
            bytes per completion, and refuses losses that read tokens; `kl` is not measured then.

    Raises:
        PolicyError: for a reference that moves, or none. On attaching, for one that cannot say what it depends on.
    """

    reference: Reference | None = None
    directory: str = "runs/reference-cache"
    per_token: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if isinstance(self.reference, CachedReference | NoReference) or (
            self.reference and self.reference.follows_policy
        ):
            raise PolicyError(f"Expected a reference whose log-probs stay as they are but got {self.reference}.")
        if self.per_token and self.reference and Field.REFERENCE_PER_TOKEN not in self.reference.provides:
            raise PolicyError(f"{self.reference} has no log-probs per token: set `reference.per_token` to false.")

    @property
    def starts_at_policy(self) -> bool:
        """As what is remembered."""
        return self.reference is None or self.reference.starts_at_policy

    @property
    def provides(self) -> frozenset[Field]:
        """Sums, and log-probs per token if they are stored; whole distributions are not."""
        return frozenset({Field.REFERENCE, Field.REFERENCE_PER_TOKEN} if self.per_token else {Field.REFERENCE})

    @property
    def unwrapped(self) -> Reference:
        """What is remembered."""
        return self.reference or self

    def check(self, policy: LoRAPolicy) -> None:
        """As what is remembered; it says what it depends on; and the directory takes files."""
        self._of(policy).check(policy)
        self.cache_identity(policy)
        try:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):  # permissions do not say that a disk takes files
                pass
        except OSError as error:
            raise PolicyError(f"Expected to write to `reference.directory` {self.directory!r} but {error}.") from error

    def attach(self, model: PeftModel, policy: LoRAPolicy) -> None:
        """Attach what is remembered, and find its folder."""
        reference = self._of(policy)
        reference.attach(model, policy)
        keep_attached(model, "cache", _Cache(reference, self, reference.cache_identity(policy)))

    def activated(self, model: PeftModel) -> NoReturn:
        """Log-probs are all there is."""
        raise PolicyError(f"{self} has no model to run: use {self.reference or 'what it remembers'} itself.")

    def logps(self, model: PeftModel, batch: CompletionBatch) -> SequenceLogps:
        """From disk; what is not there is computed and put there."""
        cache: _Cache = attached(model, "cache")
        return cache.logps(model, batch)

    def cache_identity(self, policy: LoRAPolicy) -> dict[str, Any]:
        """As what is remembered."""
        return self._of(policy).cache_identity(policy)

    def _of(self, policy: LoRAPolicy) -> Reference:
        return self.reference or default_reference(policy)


class _Cache:
    """What a `CachedReference` has open."""

    def __init__(self, reference: Reference, settings: CachedReference, identity: dict[str, Any]) -> None:
        self.reference, self.settings, self.identity = reference, settings, identity
        self._stores: dict[str, LogpStore] = {}  # by identity: autocast may be on in one pass, off in another

    def __reduce__(self) -> Any:
        """Let copies and other processes open files of their own."""
        return _Cache, (self.reference, self.settings, self.identity)

    def logps(self, model: PeftModel, batch: CompletionBatch) -> SequenceLogps:
        store = self._store(model)
        keys = [key.tobytes() for key in batch.keys.numpy()]  # they stay on the CPU
        found = [store.get(key) for key in keys]
        missing = [place for place, one in enumerate(found) if one is None]
        if agreed(model, bool(missing)) and not missing:  # another rank's are, and it cannot compute alone
            self.reference.logps(model, batch.of_completions([0]))
        if missing:
            part = batch if len(missing) == len(keys) else batch.of_completions(missing)
            computed = self._compute(model, part)
            try:
                store.put({keys[place]: one for place, one in zip(missing, computed, strict=True)})
            except OSError as error:
                raise TrainingError(
                    f"Cannot write the reference's log-probs to {store.folder}: {error}. Make room, or train without "
                    "CachedReference; what is there stays good."
                ) from error
            for place, one in zip(missing, computed, strict=True):
                found[place] = one
        # the first value of a completion is its total; its tokens follow
        values = [one for one in found if one is not None]
        total = torch.from_numpy(np.array([one[0] for one in values], np.float32))
        tokens = torch.from_numpy(np.concatenate([one[1:] for one in values])) if self.settings.per_token else None
        device = batch.input_ids.device
        return SequenceLogps(
            total.to(device, non_blocking=True),
            batch.completion_lengths.float().to(device, non_blocking=True),
            None if tokens is None else tokens.to(device, non_blocking=True),
        )

    def _compute(self, model: PeftModel, batch: CompletionBatch) -> list[NDArray[np.float32]]:
        computed = self.reference.logps(model, batch)
        assert computed is not None
        if not self.settings.per_token:
            return list(computed.total.float().cpu().numpy()[:, None])
        assert computed.per_token is not None
        # one copy: each waits for the device
        values = torch.cat([computed.total.float(), computed.per_token.float()]).cpu().numpy()
        totals, tokens = np.split(values, [len(batch.completion_lengths)])
        each = np.split(tokens, batch.completion_lengths.numpy().cumsum()[:-1])
        return [np.concatenate(one) for one in zip(totals[:, None], each, strict=True)]

    def _store(self, model: PeftModel) -> LogpStore:
        """Name the folder for this reference as it is computed now: dtypes, devices and versions round differently."""
        base = base_model(model)
        device = base.device.type
        found = kernels_of(base)
        # kernels round differently: their release counts, while they are on
        kernels = ["liger-kernel"] if found and found.on else []
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        identity = {
            "version": _VERSION,
            **self.identity,
            "per_token": self.settings.per_token,
            "compute": {
                "dtype": str(base.dtype),
                "autocast": autocast,
                "float32_matmul": torch.get_float32_matmul_precision(),
                "device": device,
                **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", *kernels)},
            },
        }
        text = json.dumps(identity, sort_keys=True, indent=1)
        if (store := self._stores.get(text)) is None:
            folder = Path(self.settings.directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
            store = self._stores[text] = LogpStore(folder, key_of(text))
            _describe(folder, text)
            from lightning.pytorch.utilities import rank_zero_info

            more = "" if len(store) else outdated(folder, json.loads(text))
            rank_zero_info(f"reference cache: {len(store)} completions in {folder}{more}")
        return store


def _describe(folder: Path, text: str) -> None:
    """For people: what the folder belongs to."""
    path = folder / "reference.json"
    if not path.is_file():
        with written_whole(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
