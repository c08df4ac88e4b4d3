"""Tokenizers built on the spot, of the two kinds that there are."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the answer? The answer is four, and not five.",
    "Once upon a time there was a duck named Ducky. Yes, no, yes.",
    "Tell me a story about a cat. I would rather not talk about cats.",
]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_level(**options) -> PreTrainedTokenizerFast:
    """GPT-2 style: nothing is added around a text; pad is EOS, padding on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    options = {"eos_token": "<eos>", "pad_token": "<eos>", "padding_side": "left", "chat_template": CHAT, **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def sentencepiece_like(template: str = "<s> $A", *, strip: bool = False) -> PreTrainedTokenizerFast:
    """Llama style: a space before what comes first, bytes for unknown characters, BOS in front."""
    alphabet = sorted(set("".join(TEXT).replace(" ", "▁") + "\n"))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    stripped = [normalizers.Strip()] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*stripped, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([word for line in TEXT * 4 for word in line.split()], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
