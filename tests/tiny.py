"""Random tiny models of many architectures, model directories on disk, and random pairs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.logps.probe import eager_attention
from lit_dpo.logps.score import completion_logps, frozen_logps

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_OWN_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}

# Each with what is special about it turned on, and strong enough to show: windows shorter than the rows, small caps.
FLAT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "mistral-window": ("MistralConfig", {**SIZES, "head_dim": 8, "sliding_window": 6}),
    "qwen2-window": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            **SIZES,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", SIZES),
    "opt-projected": (
        "OPTConfig",
        {
            **_OWN_SIZES,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "dropout": 0.0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {**_OWN_SIZES, "intermediate_size": 64, "num_hidden_layers": 2}),
    "mixtral": ("MixtralConfig", {**SIZES, "head_dim": 8, "num_local_experts": 4}),
    "mixtral-router-logits": (
        "MixtralConfig",
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "output_router_logits": True},
    ),
    "cohere-logit-scale": ("CohereConfig", {**SIZES, "logit_scale": 0.3}),
    "granite-logits-scaling": ("GraniteConfig", {**SIZES, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": ("Olmo3Config", {**SIZES, "sliding_window": 6}),
    "afmoe": ("AfmoeConfig", {**SIZES, "head_dim": 8, "sliding_window": 6}),
    "modernbert-decoder": ("ModernBertDecoderConfig", {**SIZES, "local_attention": 6}),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": ("GptOssConfig", {**SIZES, "head_dim": 8, "num_local_experts": 4, "sliding_window": 6}),
    "falcon": ("FalconConfig", {**_OWN_SIZES, "num_hidden_layers": 2, "alibi": False}),
    "falcon-alibi": ("FalconConfig", {**_OWN_SIZES, "num_hidden_layers": 2, "alibi": True}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "lfm2-conv": ("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "llama4": (
        "Llama4TextConfig",
        {**SIZES, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": 6},
    ),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}


def config(name: str, **changes: Any) -> PreTrainedConfig:
    kind, sizes = {**FLAT, **PADDED}[name]
    return getattr(transformers, kind)(**{**sizes, **changes})


def model(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model with large weights, so that log-probs differ from token to token; in eval mode, float32."""
    return from_config(config(name, **changes), seed)


def from_config(given: PreTrainedConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    found = AutoModelForCausalLM.from_config(given)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # norms and biases: not their neutral initial values
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found.eval()


def directory(at: Path, name: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A model directory with weights and a tokenizer, as a user has one."""
    model(name, seed, **changes).save_pretrained(at)
    tokenizer().save_pretrained(at)
    return at


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(32 + i): 3 + i for i in range(VOCABULARY - 3)}}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


def pairs(*lengths: tuple[int, ...], seed: int = 1, vocabulary: int = VOCABULARY) -> list[EncodedPrompt]:
    """Random prompts of the given lengths, each prompt's and its completions'; of these all are compared.

    Three lengths are a pair: prompt, chosen, rejected. The earlier completions are the better ones.
    """
    random = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=random).tolist()

    wanted = lengths or ((7, 5, 9), (3, 1, 4), (1, 12, 2))
    return [
        EncodedPrompt(tokens(prompt), [tokens(count) for count in counts], [*combinations(range(len(counts)), 2)])
        for prompt, *counts in wanted
    ]


def written_out(given: list[EncodedPrompt]) -> list[EncodedPrompt]:
    """Each comparison as a pair of its own, as other packages take them."""
    return [
        EncodedPrompt(one.prompt, [one.completions[chosen], one.completions[rejected]])
        for one in given
        for chosen, rejected in one.comparisons
    ]


def batch(*lengths: tuple[int, ...], seed: int = 1, vocabulary: int = VOCABULARY) -> CompletionBatch:
    return collate(pairs(*lengths, seed=seed, vocabulary=vocabulary))


def lora(base: Any, seed: int = 0, targets: Any = "all-linear", **options: Any) -> Any:
    """A PEFT model whose adapter does something: B is random too."""
    from peft import LoraConfig, get_peft_model

    given = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **options})
    found = get_peft_model(base, given)
    randomize(found, seed)
    return found


def randomize(adapted: Any, seed: int = 0, scale: float = 0.1) -> None:
    """Random weights for the trainable adapter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=random))


def one_at_a_time(scored: Any, given: list[EncodedPrompt]) -> list[Tensor]:
    """The definition: each completion alone through the whole model; log-probs in the order of a batch.

    Under `eager`: `sdpa` ignores the soft-cap in transformers 5.17.
    """
    base = scored.get_base_model() if hasattr(scored, "get_base_model") else scored
    with eager_attention(base):
        return _one_at_a_time(scored, given)


def _one_at_a_time(scored: Any, given: list[EncodedPrompt]) -> list[Tensor]:
    found, device = [], next(scored.parameters()).device
    for one in given:
        for completion in one.completions:
            ids = torch.tensor([[*one.prompt, *completion]], device=device)
            logits = scored(input_ids=ids, use_cache=False).logits[0].float()
            targets = torch.tensor(completion, device=device)[:, None]
            found.append(logits[len(one.prompt) - 1 : -1].log_softmax(-1).gather(-1, targets)[:, 0])
    return found


def weighted(totals: Tensor) -> Tensor:
    """A number in which every sequence has its own weight."""
    return (totals * torch.linspace(0.3, 1.7, totals.shape[0], dtype=totals.dtype, device=totals.device)).sum()


def gradients(scored: Any) -> dict[str, Tensor]:
    """Take the gradients away from the parameters."""
    found = {}
    for name, parameter in scored.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
            parameter.grad = None
    return found


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest gradient; a missing one is a gradient of zero."""
    assert one
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    assert scale > 0
    for name in one.keys() | other.keys():
        mine, theirs = one.get(name), other.get(name)
        mine = torch.zeros_like(theirs) if mine is None else mine
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def logps(
    *totals: list[float], lengths: tuple[list[int], list[int]] | None = None, dtype: Any = torch.float64
) -> PairLogps:
    """A record from up to four lists of totals."""
    chosen, rejected = lengths or ([1] * len(totals[0]), [1] * len(totals[0]))
    return PairLogps(
        *(
            SequenceLogps(torch.tensor(total, dtype=dtype), torch.tensor(length, dtype=dtype))
            for total, length in zip(totals, (chosen, rejected, chosen, rejected), strict=False)
        )
    )


def at_margin(*margins: float, dtype: Any = torch.float64) -> PairLogps:
    """Pairs with these margins, all lengths 1 and the log-probs negative."""
    zeros = [-5e4] * len(margins)
    return logps([-5e4 + margin for margin in margins], zeros, zeros, zeros, dtype=dtype)


@contextmanager
def records(name: str):
    """The log records of one logger, whatever logging is set to."""
    logger, found = logging.getLogger(name), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def with_kl(model, batch, reference, *, collision=False):
    """Log-probs of the policy, with `kl`, and those of the reference, which is `Reference.activated`."""
    frozen, logps = frozen_logps(model, batch, reference)
    return completion_logps(model, batch, collision=collision, frozen=frozen), logps
