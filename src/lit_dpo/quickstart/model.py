"""A tiny chat model and a preference data set, built on the spot: DPO to try out with nothing to download.

`quickstart_directory()` trains, in well under a minute on two CPU cores, a Llama of under a million parameters with its
own tokenizer. The model answers a small world of questions, and it has been taught two manners of answering each of
them: a direct sentence with the fact in it, and an evasion. It picks either about half of the time. The preference
data that come with it choose the direct answer, so a DPO run has something plain to achieve, and `style()` and
`is_correct()` count whether it did: the data are small, but the method, the file formats and the measures are the
ones used with a model of any size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lit_dpo.quickstart import text

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL: Final = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_TURNS: Final = ("<|system|>", "<|user|>", "<|assistant|>")

# Held out from the preference data: some topics altogether, and some questions about the others.
_HELD_OUT_TOPICS: Final = ("gravity", "photosynthesis", "DNA", "democracy", "lightning")
_HELD_OUT_QUESTIONS: Final = ("What is 2 + 2?",)
_VALIDATION_ROWS: Final = 64

# Whatever is written here goes into the name of the cached folder: a changed recipe is built anew.
_RECIPE: Final[dict[str, Any]] = {
    "version": 1,
    "seed": 0,
    # NF4 quantises in blocks of 64 weights, so every width is a multiple of it.
    "model": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    },
    "vocabulary": 2000,
    "good_share": 0.48,
    "batch": 24,
    "steps": 650,
    "learning_rate": 6e-3,
    "weight_decay": 0.01,
    "cued_share": 0.8,
}


def quickstart_directory() -> Path:
    """Return a directory with a tiny chat model and preference data for it, building it on the first call.

    The directory holds `model/`, which `from_pretrained` reads like any other checkpoint, and `train.jsonl` and
    `val.jsonl`, whose rows have a `prompt`, a `chosen` and a `rejected` list of messages. No prompt is in both files.
    It is kept under `$LIT_DPO_CACHE`, or `~/.cache/lit_dpo` where that is not set, and later calls just return it.
    The random state of the caller is left as it was.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> directory = quickstart_directory()
        >>> model = AutoModelForCausalLM.from_pretrained(directory / "model")
        >>> tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    """
    root = Path(os.environ.get("LIT_DPO_CACHE") or "~/.cache/lit_dpo").expanduser()
    directory = root / f"quickstart-{_recipe_hash()}"
    if directory.is_dir():
        return directory
    print(
        f"lit_dpo: training a tiny chat model and writing preference data to {directory} (once, about 40 s)", flush=True
    )
    # Built next to its final place, so that the rename is atomic: whoever finds the directory finds all of it.
    unfinished = root / f".{directory.name}-{uuid.uuid4().hex}"
    unfinished.mkdir(parents=True)
    try:
        for name, rows in zip(("train.jsonl", "val.jsonl"), _preference_rows(), strict=True):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (unfinished / name).write_text(lines, encoding="utf-8", newline="\n")
        _build_model(unfinished / "model")
        try:
            unfinished.rename(directory)
        except OSError:
            # Another process was first. The recipe is seeded, so its directory is as good as this one.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _recipe_hash() -> str:
    texts = (
        text.FACTS,
        text.TOPIC_QUESTIONS,
        text.SUM_QUESTIONS,
        text.GOOD,
        text.EVASIVE,
        text.CUES,
        _CHAT_TEMPLATE,
        _SPECIAL,
        _TURNS,
    )
    held_out = (_HELD_OUT_TOPICS, _HELD_OUT_QUESTIONS, _VALIDATION_ROWS)
    return hashlib.sha256(json.dumps([texts, held_out, _RECIPE]).encode()).hexdigest()[:10]


def _preference_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training rows and the held-out rows, each with one good and one evasive answer to a question."""
    rng = random.Random(_RECIPE["seed"])
    questions = list(text.questions().items())
    rng.shuffle(questions)
    # A stable sort: what must be held out comes first, and shuffled questions fill up the rest.
    questions.sort(key=lambda item: item[1] not in _HELD_OUT_TOPICS and item[0] not in _HELD_OUT_QUESTIONS)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": rng.choice(text.good_answers(text.facts()[subject]))}],
            "rejected": [{"role": "assistant", "content": rng.choice(text.evasive_answers(subject))}],
        }
        for question, subject in questions
    ]
    return rows[_VALIDATION_ROWS:], rows[:_VALIDATION_ROWS]


def quickstart_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the taught sentences: their words are whole tokens, and any other text still fits.

    It is the model's, and there in a tenth of a second, without the model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_RECIPE["vocabulary"],
        special_tokens=[*_SPECIAL.values(), *_TURNS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*text.questions(), *text.styles(), *text.CUES * 99], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=list(_TURNS),
        model_max_length=_RECIPE["model"]["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _build_model(directory: Path) -> None:
    """Train the model on both manners of answering, and save it with its tokenizer."""
    import torch

    # One thread, so that the sums do not depend on how many there are: a rounding error is another warm-up.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Only the CPU's random state is used, forked and put back; the caller's gradient mode and device do not matter.
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(_RECIPE["seed"])
            tokenizer = quickstart_tokenizer()
            model = _warm_up(tokenizer)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _warm_up(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rng = random.Random(_RECIPE["seed"])
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **_RECIPE["model"], **token_ids)
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=_RECIPE["weight_decay"], betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RECIPE["learning_rate"], total_steps=_RECIPE["steps"], pct_start=0.1
    )
    encode = functools.cache(lambda text: tokenizer(text)["input_ids"])
    questions = list(text.questions().items())
    queue: list[tuple[str, str]] = []
    for _ in range(_RECIPE["steps"]):
        sequences, answers = [], []
        for _ in range(_RECIPE["batch"]):
            if not queue:
                queue = rng.sample(questions, len(questions))
            question, subject = queue.pop()
            good = rng.random() < _RECIPE["good_share"]
            answer = rng.choice(text.good_answers(text.facts()[subject]) if good else text.evasive_answers(subject))
            cue = f"<|system|>{text.CUES[good]}" if rng.random() < _RECIPE["cued_share"] else ""
            prompt = encode(f"{_SPECIAL['bos_token']}{cue}<|user|>{question}<|assistant|>")
            completion = encode(answer + _SPECIAL["eos_token"])
            sequences.append(torch.tensor(prompt + completion))
            answers.append(torch.tensor([-100] * len(prompt) + completion))
        inputs = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
        # The padding is on the right of a causal model: no answer token sees it, and no mask is needed.
        hidden = model.model(input_ids=inputs[:, :-1], use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[targets != -100]), targets[targets != -100])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**token_ids)
    return model.eval()
