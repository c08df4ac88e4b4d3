"""Completions of held-out prompts, by the policy and by its reference, next to each other and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_dpo.callbacks.completions import sample_completions
from lit_dpo.callbacks.texts import question
from lit_dpo.errors import TrainingError
from lit_dpo.tools.measures.judges import Judge, judged
from lit_dpo.tools.measures.scoring import compared_with, held_out, measuring, the_reference

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule
    from lit_dpo.references import Reference


def sampled(
    module: DPOModule,
    data: PreferenceDataModule,
    *,
    prompts: int = 32,
    max_new_tokens: int = 64,
    seed: int = 0,
    judge: Judge | None = None,
    reference: Reference | None = None,
) -> list[dict[str, Any]]:
    """Sample a completion of each of some held-out prompts, by the policy and by its reference.

    Mode, random states, device and the module's own reference are left as they were.

    Args:
        module: fitted, or about to be.
        data: with `val` or `val_split`; its first different prompts are completed, of several sets equally many.
        prompts: how many. 0: none.
        max_new_tokens: length limit of a completion.
        seed: of sampling, the same for both.
        judge: says whose completion is better, see `Judge`: any function, `quickstart_judge`, `RewardModelJudge`.
        reference: whose completions are put next to the policy's. None: as in `pair_table`.

    Returns:
        For each prompt `prompt` (its text; of a conversation what the user said last), `reference` and `policy` (the
        completions), and `judged`: 1.0 where the policy's is the better one, 0.5, or 0.0; None without a judge.

    Raises:
        DataError: if there are no held-out prompts.
        PolicyError: for a reference that cannot be compared with.
        TrainingError: for a number below its domain, or a verdict outside [0, 1].
    """
    if prompts < 0 or max_new_tokens < 1:
        raise TrainingError(
            f"Expected `prompts` >= 0 and `max_new_tokens` >= 1 but got {prompts} and {max_new_tokens}."
        )
    if not prompts:
        return []
    held_out(data)
    rows = data.prompts("val", prompts)
    asked, ids = [pair.prompt for _, _, pair in rows], [tokens for _, tokens, _ in rows]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    compared = the_reference(module, reference)
    # a cache has no model to run
    other = compared if compared == module.reference else compared.unwrapped
    with measuring(module), compared_with(module, other):
        tokenizer = data.loaded_tokenizer
        policy = sample_completions(module.model, tokenizer, ids, **settings)
        with other.unwrapped.activated(module.model) as frozen:
            before = sample_completions(frozen, tokenizer, ids, **settings)
    verdicts = [None] * len(rows) if judge is None else judged(judge, asked, policy, before)
    columns = zip(map(question, asked), before, policy, verdicts, strict=True)
    return [dict(zip(("prompt", "reference", "policy", "judged"), row, strict=True)) for row in columns]
