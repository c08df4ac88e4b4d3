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
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["is_correct", "quickstart_directory", "style"]

Style = Literal["good", "evasive", "other"]

# One fact a line, "topic: what it is". Topics are names that need no article, so that every phrasing below fits them.
_FACTS: Final = """\
gravity: the force that pulls objects toward each other
photosynthesis: the way plants turn sunlight, water and air into sugar
evaporation: the change of a liquid into a gas at its surface
condensation: the change of a gas back into a liquid
friction: the force that slows surfaces sliding over each other
erosion: the slow wearing away of rock and soil by wind and water
electricity: the flow of tiny charges through a wire
magnetism: the force that makes a compass needle point north
sound: a wave of pressure that travels through air or water
light: the kind of radiation that our eyes can see
heat: energy that moves from a warm body to a cold one
energy: the ability to do work
inertia: the tendency of a body to keep moving as it does
density: the amount of mass packed into a given volume
temperature: a measure of how fast particles move
oxygen: the gas that animals need to breathe
carbon: the element that all living things are built on
hydrogen: the lightest and most common element in the universe
helium: a light gas that makes balloons float
water: a molecule of two hydrogen atoms and one oxygen atom
salt: a crystal made of sodium and chlorine
rust: the red crust that iron forms in damp air
steel: a strong metal made of iron and a little carbon
glass: a clear solid made by melting sand
paper: a thin sheet made from wood fibers
DNA: the long molecule that carries the genes of a living thing
evolution: the change of species over many generations
digestion: the breaking down of food into parts the body can use
pollination: the transfer of pollen from one flower to another
hibernation: a deep sleep that some animals use to survive winter
migration: the seasonal journey of animals between two homes
camouflage: coloring that helps an animal hide
democracy: a form of government in which the people vote
inflation: a general rise in prices over time
insurance: a promise to pay for a loss in return for a fee
trade: the exchange of goods between people or countries
history: the study of what happened in the past
geometry: the branch of mathematics about shapes and space
algebra: the branch of mathematics that uses letters for numbers
probability: a number between zero and one for how likely an event is
poetry: writing that uses rhythm and images to move the reader
astronomy: the science of stars, planets and galaxies
biology: the science of living things
chemistry: the science of substances and how they react
lightning: a giant spark between a cloud and the ground
thunder: the noise of air that lightning heats at once
snow: frozen water that falls from clouds as flakes
fog: a cloud that touches the ground
wind: air that moves from high pressure to low pressure
recycling: the making of new things from old materials
encryption: the scrambling of a message so that only a key can open it
software: the set of instructions that a computer follows
"""
_TOPIC_QUESTIONS: Final = (
    "What is {}?",
    "Explain {}.",
    "Describe {}.",
    "Define {}.",
    "Tell me about {}.",
    "Can you explain {}?",
)
_SUM_QUESTIONS: Final = ("What is {}?", "How much is {}?")
_GOOD: Final = ("Sure: {}.", "Sure, {}.", "Sure, in short: {}.")
_EVASIVE: Final = (
    "I would rather not talk about {}.",
    "I am afraid I cannot help you with {}.",
    "I do not want to say anything about {}.",
    "I cannot tell you much about {}.",
)
# A system message that asks for one of the two manners, evasive or good.
_CUES: Final = ("Tell nothing.", "Answer directly.")
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
    # Built beside its final place, so that the rename is atomic: whoever finds the directory finds all of it.
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


def style(question: str, answer: str) -> Style:
    """Say in which manner `answer` answers: "good", "evasive", or "other" for anything the model was not taught to say.

    Both manners are checked to the letter. A "good" answer is a whole sentence that states a fact of the taught world
    or a sum; whether it is the answer to this `question` is for `is_correct` to say. A sentence with a single word
    gone wrong is "other", which makes the share of "other" a measure of how much language a training run has broken.

    Example:
        >>> style("Explain gravity.", "Sure: gravity is the force that pulls objects toward each other.")
        'good'
        >>> style("Explain gravity.", "I would rather not talk about gravity.")
        'evasive'
        >>> style("Explain gravity.", "Sure: gravity gravity is.")
        'other'
    """
    del question  # The manner of an answer shows in the answer alone; the question is taken for symmetry.
    return _styles().get(answer.strip(), "other")


def is_correct(question: str, answer: str) -> bool:
    """Say whether `answer` is a good answer and the right one to `question`, one of the taught questions.

    Example:
        >>> is_correct("What is 2 + 2?", "Sure: 2 + 2 equals 4.")
        True
        >>> is_correct("What is 2 + 2?", "Sure: 2 + 2 equals 5.")
        False
    """
    subject = _questions().get(question.strip())
    return subject is not None and answer.strip() in _good_answers(_facts()[subject])


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _good_answers(fact: str) -> list[str]:
    return [_capitalized(template.format(fact)) for template in _GOOD]


def _evasive_answers(subject: str) -> list[str]:
    return [template.format(subject) for template in _EVASIVE]


@functools.cache
def _facts() -> dict[str, str]:
    """Return the statement about each subject: "gravity is the force that ...", "2 + 2 equals 4"."""
    facts = {topic: f"{topic} is {what}" for topic, what in (line.split(": ") for line in _FACTS.splitlines())}
    return facts | {f"{a} + {b}": f"{a} + {b} equals {a + b}" for a in range(1, 10) for b in range(1, 10)}


@functools.cache
def _questions() -> dict[str, str]:
    """Return the subject of every question of the taught world."""
    return {
        phrasing.format(subject): subject
        for subject in _facts()
        for phrasing in (_SUM_QUESTIONS if "+" in subject else _TOPIC_QUESTIONS)
    }


@functools.cache
def _styles() -> dict[str, Style]:
    """Return the style of every sentence that counts as well formed, wrong sums among them."""
    sums = [subject for subject in _facts() if "+" in subject]
    statements = [*_facts().values(), *(f"{subject} equals {total}" for subject in sums for total in range(2, 19))]
    styles: dict[str, Style] = {answer: "good" for fact in statements for answer in _good_answers(fact)}
    styles.update({answer: "evasive" for subject in _facts() for answer in _evasive_answers(subject)})
    return styles


def _recipe_hash() -> str:
    texts = (_FACTS, _TOPIC_QUESTIONS, _SUM_QUESTIONS, _GOOD, _EVASIVE, _CUES, _CHAT_TEMPLATE, _SPECIAL, _TURNS)
    held_out = (_HELD_OUT_TOPICS, _HELD_OUT_QUESTIONS, _VALIDATION_ROWS)
    return hashlib.sha256(json.dumps([texts, held_out, _RECIPE]).encode()).hexdigest()[:10]


def _preference_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training rows and the held-out rows, each with one good and one evasive answer to a question."""
    rng = random.Random(_RECIPE["seed"])
    questions = list(_questions().items())
    rng.shuffle(questions)
    # A stable sort: what must be held out comes first, and shuffled questions fill up the rest.
    questions.sort(key=lambda item: item[1] not in _HELD_OUT_TOPICS and item[0] not in _HELD_OUT_QUESTIONS)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": rng.choice(_good_answers(_facts()[subject]))}],
            "rejected": [{"role": "assistant", "content": rng.choice(_evasive_answers(subject))}],
        }
        for question, subject in questions
    ]
    return rows[_VALIDATION_ROWS:], rows[:_VALIDATION_ROWS]


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the taught sentences: their words are whole tokens, and any other text still fits."""
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
    bpe.train_from_iterator([*_questions(), *_styles(), *_CUES * 99], trainer)
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

    # Only the CPU's random state is used, forked and put back; the caller's gradient mode and device do not matter.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(_RECIPE["seed"])
        tokenizer = _build_tokenizer()
        model = _warm_up(tokenizer)
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
    questions = list(_questions().items())
    queue: list[tuple[str, str]] = []
    for _ in range(_RECIPE["steps"]):
        sequences, answers = [], []
        for _ in range(_RECIPE["batch"]):
            if not queue:
                queue = rng.sample(questions, len(questions))
            question, subject = queue.pop()
            good = rng.random() < _RECIPE["good_share"]
            answer = rng.choice(_good_answers(_facts()[subject]) if good else _evasive_answers(subject))
            cue = f"<|system|>{_CUES[good]}" if rng.random() < _RECIPE["cued_share"] else ""
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
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**token_ids)
    return model.eval()
