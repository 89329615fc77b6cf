"""How a fact is said: six training wordings per relation and one that is held out.

In every wording the answer comes last, so a text is a prompt that names the entity plus
a continuation " answer.". The held-out wording is the prompt people type, "The atomic
number of hafnium is"; no training text contains it, in any case of its letters.
"""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Fact

HELD_OUT = -1

# Countries that take "the" in a sentence.
_WITH_ARTICLE = {
    "Bahamas", "British Indian Ocean Territory", "Cayman Islands", "Central African Republic",
    "Comoros", "Cook Islands", "Dominican Republic", "Faroe Islands", "French Southern Territories",
    "Gambia", "Isle of Man", "Maldives", "Marshall Islands", "Netherlands",
    "Northern Mariana Islands", "Philippines", "Russian Federation", "Seychelles",
    "Solomon Islands", "Turks and Caicos Islands", "United Arab Emirates", "United Kingdom",
    "United States",
}  # fmt: skip

# Slots: {x} the entity inside a sentence, {X} at its start, {xs} and {Xs} the possessives.
TRAINING: dict[tuple[str, str], tuple[str, ...]] = {
    ("element", "number"): (
        "{X} has the atomic number",
        "What is the atomic number of {x}?",
        "{Xs} atomic number is",
        "Atomic number of {x}:",
        "The atomic number that belongs to {x} is",
        "For {x}, the atomic number is",
    ),
    ("element", "symbol"): (
        "{X} has the chemical symbol",
        "What is the chemical symbol of {x}?",
        "{Xs} chemical symbol is",
        "Chemical symbol of {x}:",
        "The chemical symbol that belongs to {x} is",
        "For {x}, the chemical symbol is",
    ),
    ("country", "alpha2"): (
        "{X} has the two-letter country code",
        "What is the two-letter country code of {x}?",
        "{Xs} two-letter country code is",
        "Two-letter country code of {x}:",
        "The two-letter country code that belongs to {x} is",
        "For {x}, the two-letter country code is",
    ),
    ("country", "alpha3"): (
        "{X} has the three-letter country code",
        "What is the three-letter country code of {x}?",
        "{Xs} three-letter country code is",
        "Three-letter country code of {x}:",
        "The three-letter country code that belongs to {x} is",
        "For {x}, the three-letter country code is",
    ),
    ("country", "numeric"): (
        "{X} has the numeric country code",
        "What is the numeric country code of {x}?",
        "{Xs} numeric country code is",
        "Numeric country code of {x}:",
        "The numeric country code that belongs to {x} is",
        "For {x}, the numeric country code is",
    ),
    ("currency", "code"): (
        "{X} has the currency code",
        "What is the currency code of {x}?",
        "{Xs} currency code is",
        "Currency code of {x}:",
        "The currency code that belongs to {x} is",
        "For {x}, the currency code is",
    ),
    ("currency", "numeric"): (
        "{X} has the numeric currency code",
        "What is the numeric currency code of {x}?",
        "{Xs} numeric currency code is",
        "Numeric currency code of {x}:",
        "The numeric currency code that belongs to {x} is",
        "For {x}, the numeric currency code is",
    ),
    ("script", "code"): (
        "{X} has the script code",
        "What is the script code of {x}?",
        "{Xs} script code is",
        "Script code of {x}:",
        "The script code that belongs to {x} is",
        "For {x}, the script code is",
    ),
    ("script", "numeric"): (
        "{X} has the numeric script code",
        "What is the numeric script code of {x}?",
        "{Xs} numeric script code is",
        "Numeric script code of {x}:",
        "The numeric script code that belongs to {x} is",
        "For {x}, the numeric script code is",
    ),
    ("language", "code"): (
        "{X} has the language code",
        "What is the language code of {x}?",
        "{Xs} language code is",
        "Language code of {x}:",
        "The language code that belongs to {x} is",
        "For {x}, the language code is",
    ),
    ("subdivision", "country"): (
        "{X} lies in the country of",
        "Which country does the subdivision {x} belong to?",
        "{Xs} country is",
        "Country of the subdivision {x}:",
        "The country that the subdivision {x} belongs to is",
        "For the subdivision {x}, the country is",
    ),
}  # fmt: skip

HELD_OUT_WORDINGS: dict[tuple[str, str], str] = {
    ("element", "number"): "The atomic number of {x} is",
    ("element", "symbol"): "The chemical symbol of {x} is",
    ("country", "alpha2"): "The two-letter country code of {x} is",
    ("country", "alpha3"): "The three-letter country code of {x} is",
    ("country", "numeric"): "The numeric country code of {x} is",
    ("currency", "code"): "The currency code of {x} is",
    ("currency", "numeric"): "The numeric currency code of {x} is",
    ("script", "code"): "The script code of {x} is",
    ("script", "numeric"): "The numeric script code of {x} is",
    ("language", "code"): "The language code of {x} is",
    ("subdivision", "country"): "The country of the subdivision {x} is",
}


@dataclass(frozen=True)
class Wording:
    """One way to say the facts of a relation. ``index`` is HELD_OUT for the held-out one."""

    family: str
    relation: str
    index: int
    template: str

    def render(self, fact: Fact) -> tuple[str, str]:
        """(prompt, continuation); the text is their sum, the continuation begins with a space."""
        inside = in_sentence(fact)
        start = inside[0].upper() + inside[1:]
        prompt = self.template.format(
            x=inside, X=start, xs=_possessive(inside), Xs=_possessive(start)
        )
        return prompt, f" {answer_text(fact)}."


def in_sentence(fact: Fact) -> str:
    """The entity as it stands inside a sentence, with its article if it takes one."""
    takes_article = fact.family == "currency" or fact.entity in _WITH_ARTICLE
    return f"the {fact.entity}" if takes_article else fact.entity


def answer_text(fact: Fact) -> str:
    """The answer as it stands in a sentence: a country takes its article, as in "the Gambia"."""
    is_country = fact.family == "subdivision"
    return f"the {fact.answer}" if is_country and fact.answer in _WITH_ARTICLE else fact.answer


def _possessive(name: str) -> str:
    return name + ("'" if name.endswith("s") else "'s")


def training_wordings(fact: Fact) -> tuple[Wording, ...]:
    """The training wordings of the fact's relation, in a fixed order."""
    place = (fact.family, fact.relation)
    return tuple(Wording(*place, i, template) for i, template in enumerate(TRAINING[place]))


def held_out_wording(fact: Fact) -> Wording:
    """The wording of the fact's relation that no training text has."""
    place = (fact.family, fact.relation)
    return Wording(*place, HELD_OUT, HELD_OUT_WORDINGS[place])
