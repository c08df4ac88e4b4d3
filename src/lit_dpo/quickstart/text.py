"""The small world that the quickstart's model is taught: facts, questions, and two manners of answering them."""

from __future__ import annotations

import functools
from typing import Final, Literal

Style = Literal["good", "evasive", "other"]

# One fact a line, "topic: what it is". Topics are names that need no article, so that every phrasing below fits them.
FACTS: Final = """\
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
TOPIC_QUESTIONS: Final = (
    "What is {}?",
    "Explain {}.",
    "Describe {}.",
    "Define {}.",
    "Tell me about {}.",
    "Can you explain {}?",
)
SUM_QUESTIONS: Final = ("What is {}?", "How much is {}?")
GOOD: Final = ("Sure: {}.", "Sure, {}.", "Sure, in short: {}.")
EVASIVE: Final = (
    "I would rather not talk about {}.",
    "I am afraid I cannot help you with {}.",
    "I do not want to say anything about {}.",
    "I cannot tell you much about {}.",
)
# A system message that asks for one of the two manners, evasive or good.
CUES: Final = ("Tell nothing.", "Answer directly.")


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
    return styles().get(answer.strip(), "other")


def is_correct(question: str, answer: str) -> bool:
    """Say whether `answer` is a good answer and the right one to `question`, one of the taught questions.

    Example:
        >>> is_correct("What is 2 + 2?", "Sure: 2 + 2 equals 4.")
        True
        >>> is_correct("What is 2 + 2?", "Sure: 2 + 2 equals 5.")
        False
    """
    subject = questions().get(question.strip())
    return subject is not None and answer.strip() in good_answers(facts()[subject])


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def good_answers(fact: str) -> list[str]:
    """Return the good answers that state a fact."""
    return [_capitalized(template.format(fact)) for template in GOOD]


def evasive_answers(subject: str) -> list[str]:
    """Return the evasive answers about a subject."""
    return [template.format(subject) for template in EVASIVE]


@functools.cache
def facts() -> dict[str, str]:
    """Return the statement about each subject: "gravity is the force that ...", "2 + 2 equals 4"."""
    known = {topic: f"{topic} is {what}" for topic, what in (line.split(": ") for line in FACTS.splitlines())}
    return known | {f"{a} + {b}": f"{a} + {b} equals {a + b}" for a in range(1, 10) for b in range(1, 10)}


@functools.cache
def questions() -> dict[str, str]:
    """Return the subject of every question of the taught world."""
    return {
        phrasing.format(subject): subject
        for subject in facts()
        for phrasing in (SUM_QUESTIONS if "+" in subject else TOPIC_QUESTIONS)
    }


@functools.cache
def styles() -> dict[str, Style]:
    """Return the style of every sentence that counts as well formed, wrong sums among them."""
    sums = [subject for subject in facts() if "+" in subject]
    statements = [*facts().values(), *(f"{subject} equals {total}" for subject in sums for total in range(2, 19))]
    found: dict[str, Style] = {answer: "good" for fact in statements for answer in good_answers(fact)}
    found.update({answer: "evasive" for subject in facts() for answer in evasive_answers(subject)})
    return found
