"""The atomic numbers task (the paper, section 4, figures 1 and 6b): 118 facts of known frequency.

The prompt is "The atomic number of {X} is"; the model writes on, greedily, and the first number in
what it writes is its answer. Elements are in five buckets by how often their names occur in the
training corpus (``names.count_names``; symbols do not count). Conditions: ``none``, ``generic``,
``fetched``, ``blocked`` (the best-matching level-1 cluster and all below it, 1/k of the bank), and
``anchor_same_tokens`` where a model has that control.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from .facts import on_path
from .names import buckets, count_names
from .questions import Question

if TYPE_CHECKING:
    from ..engine import MemoryLM

#: In order of atomic number, IUPAC spelling.
ELEMENTS: tuple[str, ...] = tuple(
    """
    hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium
    aluminium silicon phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium
    chromium manganese iron cobalt nickel copper zinc gallium germanium arsenic selenium bromine
    krypton rubidium strontium yttrium zirconium niobium molybdenum technetium ruthenium rhodium
    palladium silver cadmium indium tin antimony tellurium iodine xenon caesium barium lanthanum
    cerium praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium holmium
    erbium thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum gold
    mercury thallium lead bismuth polonium astatine radon francium radium actinium thorium
    protactinium uranium neptunium plutonium americium curium berkelium californium einsteinium
    fermium mendelevium nobelium lawrencium rutherfordium dubnium seaborgium bohrium hassium
    meitnerium darmstadtium roentgenium copernicium nihonium flerovium moscovium livermorium
    tennessine oganesson
    """.split()
)
#: Other spellings, which count for the same element.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "aluminium": ("aluminum",),
    "caesium": ("cesium",),
    "sulfur": ("sulphur",),
}
PROMPT = "The atomic number of {} is"
CONDITIONS = ("none", "generic", "fetched", "blocked", "anchor_same_tokens")
BUCKETS = ("most frequent", "frequent", "middle", "rare", "rarest")

#: Tokens in which the number has to come.
MAX_TOKENS = 16

# A number that is no part of another one, with or without commas between thousands.
_NUMBER = re.compile(r"(?<![0-9.])[0-9]+(?:,[0-9]{3})*(\.[0-9])?")


def read_integer(text: str) -> int | None:
    """The first number in a text; None if there is none, or it is no integer."""
    found = _NUMBER.search(text)
    return None if found is None or found[1] else int(found[0].replace(",", ""))


def count_elements(texts: Iterable[str]) -> list[int]:
    """How often each element is named in some texts, in the order of :data:`ELEMENTS`."""
    names = {element: ALIASES.get(element, ()) for element in ELEMENTS}
    return list(count_names(texts, names).values())


def questions(counts: Sequence[int] | None = None) -> tuple[list[Question], list[str]]:
    """The 118 questions, and the names of the buckets.

    Args:
        counts: of each element's name in the training corpus, from :func:`count_elements`; without
            them all are in one bucket, "all".

    Raises:
        InputError: there are not 118 counts.
    """
    if counts is None:
        counts, names = [0] * len(ELEMENTS), ["all"]
    else:
        names = list(BUCKETS)
    if len(counts) != len(ELEMENTS):
        raise InputError(f"{len(counts)} counts; expected {len(ELEMENTS)}, one for each element")
    places = buckets(counts, len(names)).tolist()
    return [
        Question(PROMPT.format(element), f" {number}.", str(number), "element", count, bucket, [])
        for number, (element, count, bucket) in enumerate(
            zip(ELEMENTS, counts, places, strict=True), 1
        )
    ], names


def answer(
    lm: MemoryLM,
    asked: Sequence[Question],
    control: MemoryLM | None = None,
    conditions: Sequence[str] = CONDITIONS,
) -> dict[str, np.ndarray]:
    """Ask under every condition.

    Args:
        lm: the model; its bank's blocked blocks stay as they are.
        asked: from :func:`questions`.
        control: the second control (``facts.load_control``); without it that condition is left out.
        conditions: some of :data:`CONDITIONS`.

    Returns:
        Condition -> (N,) bool, whether the number is right.

    Raises:
        InputError: there is no question; the bank has no tree.
    """
    if not asked:
        raise InputError("there are no questions to ask; give at least one")
    chosen = [name for name in conditions if control is not None or name != CONDITIONS[-1]]
    hits = {}
    with tqdm(total=len(chosen) * len(asked), unit="question", disable=None) as bar:
        for name in chosen:
            bar.set_description(name)
            right = []
            for question in asked:
                right.append(_number(lm, control, question.prompt, name) == int(question.answer))
                bar.update()
            hits[name] = np.array(right)
    return hits


def _number(lm: MemoryLM, control: MemoryLM | None, prompt: str, condition: str) -> int | None:
    """The number that a model writes after a prompt."""
    options: dict[str, Any] = {"memory": condition}
    if condition == "blocked":
        options = {"memory": "fetched", "blocked": on_path(lm, lm.route(prompt).ids)}
    elif condition == CONDITIONS[-1]:
        assert control is not None, "without one the condition is left out"
        lm, options = control, {"memory": "none"}
    text = ""
    for piece in lm.stream(prompt, max_tokens=MAX_TOKENS, **options):
        text += piece.text
        found = _NUMBER.search(text)
        if found and len(text) > found.end() + 1:  # what follows shows that the number has ended
            break
    return read_integer(text)
