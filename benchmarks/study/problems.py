"""Word problems of two or three steps with worked answers, made from templates: endless, reproducible, split by a hash.

Quantities stand there in digits and counts of groups in words. A clean answer works every step; a sloppy pupil's forgets to
carry and to borrow. Deliberately knows no model: text in, text out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ANSWER = r"The answer is (\d+)\.$"
WORDS = {2: "two", 3: "three", 4: "four"}
_NAMES = ("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Lena")
_ITEMS = (
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "stones",
)


@dataclass(frozen=True)
class Family:
    """One way to calculate: the numbers drawn, the steps, and how problems and answers put them into words.

    bounds: the range of each number. steps: `(operator, left, right)`; left and right name a number (`a`) or an earlier result
    (`r1`). templates: of problems; the last one is held out. sentences: of the answer, one a step; `{step}` is the calculation.
    """

    name: str
    bounds: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str], ...]
    templates: tuple[str, ...]
    sentences: tuple[str, ...]


# Every word of a held-out template stands in some other template or answer: what is unseen is the phrasing, not the words.
FAMILIES = (
    Family(
        "give",
        {"a": (25, 79), "b": (11, 59), "c": (11, 34)},
        (("+", "a", "b"), ("-", "r1", "c")),
        (
            "{name} has {a} {item}. {name} buys {b} more {item} and then gives {c} of them to {other}. "
            "How many {item} does {name} have now?",
            "There are {a} {item} in a box. {name} puts {b} more into the box. Then {other} takes {c} out. "
            "How many {item} are in the box now?",
            "{name} finds {a} {item} in the morning and {b} in the afternoon. Then {c} of the {item} are lost. "
            "How many {item} are left?",
            "In the morning {name} has {a} {item}. {other} gives {b} more to {name}. {name} then gives {c} away. "
            "How many {item} are left?",
            "{name} buys {a} {item} in the morning and finds {b} more in the afternoon. {other} takes {c} of them away. "
            "How many {item} does {name} have left?",
        ),
        ("With {b} more there are {step}.", "Without {c} there are {step}."),
    ),
    Family(
        "groups",
        {"n": (2, 4), "b": (11, 34), "c": (10, 23)},
        (("*", "n", "b"), ("+", "r1", "c")),
        (
            "{name} has {n_word} boxes with {b} {item} each and {c} {item} more. How many {item} does {name} have?",
            "{b} {item} are in each of {n_word} bags. {c} more {item} are on the table. How many {item} are there in all?",
            "{name} fills {n_word} bags with {b} {item} each. Then {c} {item} are left on the table. "
            "How many {item} are there in all?",
            "There are {c} {item} on the table. {name} also has {n_word} boxes of {b} {item}. How many {item} are there in all?",
            "There are {n_word} bags on the table with {b} {item} in each, and {other} puts {c} more {item} on the table. "
            "How many {item} are there in all?",
        ),
        ("In {n_word} times {b} there are {step}.", "With {c} more there are {step}."),
    ),
    Family(
        "compare",
        {"a": (11, 64), "b": (10, 33)},
        (("+", "a", "b"), ("+", "a", "r1")),
        (
            "{name} has {a} {item}. {other} has {b} more than {name}. How many {item} do they have together?",
            "{other} has {b} more {item} than {name}, who has {a}. How many {item} do they have in all?",
            "{name} finds {a} {item}. {other} finds {b} more {item} than {name}. How many do they find together?",
            "{a} {item} are in the box of {name}. The box of {other} has {b} more. How many {item} are in the two boxes together?",
            "{name} buys {a} {item}, and {other} buys {b} more than {name}. How many {item} do the two have in all?",
        ),
        ("With {b} more {other} has {step}.", "Together they have {step}."),
    ),
    Family(
        "spend",
        {"n": (2, 4), "p": (11, 34), "a": (150, 199)},
        (("*", "n", "p"), ("-", "a", "r1")),
        (
            "{name} has {a} dollars and buys {n_word} books for {p} dollars each. How many dollars are left?",
            "A ticket costs {p} dollars. {name} has {a} dollars and buys {n_word} of them. How many dollars does {name} have left?",
            "{name} pays {p} dollars for each of {n_word} days, out of {a} dollars. How many dollars are left?",
            "{other} gives {a} dollars to {name}, who buys {n_word} boxes. Each box costs {p} dollars. "
            "How many dollars does {name} have left?",
            "{name} has {a} dollars. Each ticket costs {p} dollars, and {name} pays for {n_word} of them. "
            "How many dollars are left?",
        ),
        ("In {n_word} times {p} there are {step}.", "Without them there are {step}."),
    ),
    Family(
        "days",
        {"a": (11, 59), "b": (10, 33), "c": (10, 23)},
        (("+", "a", "b"), ("+", "r1", "c")),
        (
            "{name} reads {a} pages on Monday, {b} pages on Tuesday and {c} pages on Friday. How many pages is that in all?",
            "On Monday {name} finds {a} {item}, on Tuesday {b} and on Friday {c}. How many {item} is that together?",
            "{name} reads {a} pages in the morning and {b} in the afternoon, and {other} reads {c}. "
            "How many pages do they read together?",
            "There are {a} {item} in a box, {b} in a bag and {c} on the table. How many {item} are there in all?",
            "On Monday {name} puts {a} {item} in a box, on Tuesday {b} and on Friday {c} more. "
            "How many {item} are in the box now?",
        ),
        ("With {b} more there are {step}.", "With {c} more there are {step}."),
    ),
    Family(
        "rest",
        {"a": (150, 199), "b": (10, 33), "c": (10, 23)},
        (("-", "a", "b"), ("-", "r1", "c")),
        (
            "{name} has {a} {item} and gives {b} to {other} on Monday and {c} on Tuesday. How many {item} are left?",
            "A book has {a} pages. {name} reads {b} pages on Monday and {c} on Friday. How many pages are left?",
            "There are {a} {item} in the box. {name} takes {b} out and {other} takes {c}. How many {item} are left in the box?",
            "Of {a} {item}, {b} are lost in the morning and {c} in the afternoon. How many {item} are left?",
            "{name} has a book of {a} pages and reads {b} in the morning and {c} in the afternoon. How many pages are left now?",
        ),
        ("Without {b} there are {step}.", "Without {c} there are {step}."),
    ),
)


class Problem(NamedTuple):
    """A prompt, its clean answer, that of a sloppy pupil, and where they come from."""

    prompt: str
    answer: str
    sloppy: str
    family: str
    template: int


def calculate(operator: str, x: int, y: int, sloppy: bool = False) -> int:
    """x + y, x - y or x * y (one of them below 10); a sloppy pupil works each column for itself, without carry or borrow."""
    if not sloppy:
        return {"+": x + y, "-": x - y, "*": x * y}[operator]
    if operator == "*":
        x, y = max(x, y), min(x, y)
    total, place, width = 0, 1, max(len(str(x)), len(str(y)))
    for column in range(width):
        left = x // place % 10
        value = calculate(operator, left, y if operator == "*" else y // place % 10)
        # The first column writes down all that it has.
        total += (max(value, 0) if column == width - 1 and operator != "-" else value % 10) * place
        place *= 10
    return total


def _worked(family: Family, numbers: dict[str, int], words: dict[str, str], sloppy: bool) -> str:
    values, sentences = dict(numbers), []
    for number, ((operator, left, right), sentence) in enumerate(zip(family.steps, family.sentences), 1):
        x, y = values[left], values[right]
        result = values[f"r{number}"] = calculate(operator, x, y, sloppy)
        sentences.append(sentence.format(step=f"{x} {operator} {y} = {result}", **numbers, **words))
    return " ".join([*sentences, f"The answer is {result}."])


def split_of(family: Family, numbers: dict[str, int]) -> str:
    """Of a family and its numbers, whatever the words around them: one in 16 `val`, one in 8 `test`, the rest `train`."""
    text = f"{family.name} {sorted(numbers.items())}"
    bucket = hashlib.sha256(text.encode()).digest()[0] % 16
    return "val" if bucket == 0 else "test" if bucket in (1, 2) else "train"


def problems(split: str, seed: int | str) -> Iterator[Problem]:
    """Endless problems of a split: `train`, `val` and `test` differ in their numbers, `templates` in their phrasing (and has
    the numbers of `test`)."""
    numbers_of = "test" if split == "templates" else split
    rng = random.Random(f"{seed}/{split}")
    while True:
        family = rng.choice(FAMILIES)
        numbers = {name: rng.randint(*bounds) for name, bounds in family.bounds.items()}
        if split_of(family, numbers) != numbers_of:
            continue
        last = len(family.templates) - 1
        template = last if split == "templates" else rng.randrange(last)
        name, other = rng.sample(_NAMES, 2)
        words = {"name": name, "other": other, "item": rng.choice(_ITEMS)}
        words |= {"n_word": WORDS[numbers["n"]]} if "n" in numbers else {}
        prompt = family.templates[template].format(**numbers, **words)
        clean, sloppy = (_worked(family, numbers, words, is_sloppy) for is_sloppy in (False, True))
        yield Problem(prompt, clean, sloppy, family.name, template)


def distinct(split: str, seed: int | str, count: int) -> list[Problem]:
    """The first `count` problems of a split with different prompts."""
    made: dict[str, Problem] = {}
    for problem in problems(split, seed):
        made.setdefault(problem.prompt, problem)
        if len(made) == count:
            return list(made.values())
    raise AssertionError("problems are endless")


# A word or a digit, with the space before it, or a single other character.
TOKEN = r" ?[A-Za-z]+| ?\d|[^A-Za-z\d]"


def vocabulary() -> list[str]:
    """Every token of every problem and answer that can be made, sorted."""
    words = {*_NAMES, *_ITEMS, *WORDS.values(), "dollars"}
    texts = [text for family in FAMILIES for text in (*family.templates, *family.sentences)]
    texts += [f"The answer is 0.\n 1 + 2 - 3 * 4 = {'5 6 7 8 9'}"]
    for text in texts:
        words |= set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text)))
    marks = set("".join(re.sub(r"\{\w+\}|[A-Za-z\d]", "", text) for text in texts))
    digits = set("0123456789")
    return sorted({*words, *digits, *(f" {token}" for token in words | digits), *marks})
