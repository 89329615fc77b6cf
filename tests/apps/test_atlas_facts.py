"""The facts are true, unambiguous, plainly named, and always the same."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pycountry
import pytest

from apps.atlas.facts import Fact, drop_ambiguous, facts, fold, popularity

# The periodic table a second time, row by row, so that a slip in either one shows.
TABLE = """
H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar
K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe
Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
""".split()

KNOWN = {
    ("element", "number", "hafnium"): "72",
    ("element", "symbol", "hafnium"): "Hf",
    ("element", "number", "oganesson"): "118",
    ("element", "symbol", "tungsten"): "W",
    ("element", "number", "gold"): "79",
    ("country", "alpha2", "Switzerland"): "CH",
    ("country", "alpha3", "Afghanistan"): "AFG",
    ("country", "numeric", "Albania"): "008",
    ("currency", "code", "Swiss Franc"): "CHF",
    ("script", "code", "Devanagari"): "Deva",
    ("script", "numeric", "Latin"): "215",
    ("language", "code", "German"): "deu",
    ("subdivision", "country", "Texas"): "United States",
}


@pytest.mark.parametrize("place", KNOWN, ids="/".join)
def test_known_answers(place: tuple[str, str, str]) -> None:
    answers = [f.answer for f in facts() if (f.family, f.relation, f.entity) == place]
    assert answers == [KNOWN[place]]


def test_size_and_families() -> None:
    families = Counter(f.family for f in facts())
    assert 8_000 <= len(facts()) <= 9_500
    assert families["element"] == 236
    assert set(families) == {
        "element", "country", "currency", "script", "language", "subdivision",
    }  # fmt: skip
    assert families["language"] > 4_000 and families["subdivision"] > 2_000


def test_elements_are_the_periodic_table() -> None:
    elements = [f for f in facts() if f.family == "element"]
    numbers = [int(f.answer) for f in elements if f.relation == "number"]
    symbols = [f.answer for f in elements if f.relation == "symbol"]
    assert numbers == list(range(1, 119))
    assert symbols == TABLE and len(set(symbols)) == 118
    # Ten symbols come from other names than the English one; the rest share its letter.
    other = {
        f.entity for f in elements if f.relation == "symbol" and f.answer[0] != f.entity[0].upper()
    }
    assert other == {
        "sodium", "potassium", "iron", "silver", "tin", "antimony", "tungsten", "gold", "mercury",
        "lead",
    }  # fmt: skip


def test_every_answer_is_in_the_library() -> None:
    places: dict[str, list[str]] = {}
    for place in pycountry.subdivisions:
        country = pycountry.countries.get(alpha_2=place.country_code)
        name = getattr(country, "common_name", country.name)
        places.setdefault(fold(place.name), []).append(fold(name))
    for fact in facts():
        if fact.family == "country":
            code = pycountry.countries.get(**{_FIELD[fact.relation]: fact.answer})
            name = getattr(code, "common_name", code.name)
        elif fact.family == "language":
            name = pycountry.languages.get(alpha_3=fact.answer).name
        elif fact.family == "subdivision":
            assert places[fold(fact.entity)] == [fold(fact.answer)]
            continue
        elif fact.family == "currency":
            code = {"code": "alpha_3"}.get(fact.relation, fact.relation)
            name = pycountry.currencies.get(**{code: fact.answer}).name
        else:  # elements have their own test; scripts are known by the first of their names
            continue
        assert fold(name.replace("’", "'")) == fold(fact.entity), fact


_FIELD = {"alpha2": "alpha_2", "alpha3": "alpha_3", "numeric": "numeric"}


def test_one_answer_per_question() -> None:
    questions = Counter((f.family, f.relation, fold(f.entity)) for f in facts())
    assert max(questions.values()) == 1
    assert len({f.key for f in facts()}) == len(facts())


def test_names_are_plain_and_normalised() -> None:
    for fact in facts():
        for text in (fact.entity, fact.answer):
            assert unicodedata.is_normalized("NFC", text)
            assert not set(text) & set(',;/()[]"*.') and text == text.strip() and len(text) <= 26


def test_a_bare_name_of_two_countries_is_left_out() -> None:
    assert "Congo" not in {f.entity for f in facts()}


def test_drop_ambiguous() -> None:
    good = Fact("language", "code", "Ido", "ido")
    twins = [Fact("language", "code", "Aka", "soh"), Fact("language", "code", "Áka", "axk")]
    assert drop_ambiguous([good, *twins, good]) == [good]


def test_an_unclear_answer_takes_the_whole_entity_along() -> None:
    same_code = Fact("currency", "code", "Bolívar", "VED")
    numbers = [Fact("currency", "numeric", "Bolívar", n) for n in ("926", "928")]
    assert drop_ambiguous([same_code, *numbers]) == []


def test_popularity_falls_with_words() -> None:
    assert popularity("Germany") > popularity("Kiribati") > 0.0
    assert popularity("New York") < min(popularity("New"), popularity("York"))
    assert popularity("Qxzvvk") == 0.0
