"""Several thousand true, checkable facts: (family, relation, entity) -> answer.

The elements are in this file; countries, currencies, scripts, languages (ISO 639-3)
and subdivisions (ISO 3166-2) come from pycountry, the popularity of names from wordfreq.
A fact is kept only if its question has one answer: within a family no two entities may
have names that differ only in case or accents, and names that need brackets, commas or
slashes are left out. The order is fixed, so an index into ``facts()`` names a fact.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

LANGUAGES = 6000
SUBDIVISIONS = 3500
SUBDIVISIONS_PER_COUNTRY = 25  # so that no country is a good guess for all of them

# In order of atomic number, IUPAC spelling.
ELEMENTS = """
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O,
fluorine F, neon Ne, sodium Na, magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S,
chlorine Cl, argon Ar, potassium K, calcium Ca, scandium Sc, titanium Ti, vanadium V, chromium Cr,
manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, gallium Ga, germanium Ge,
arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, strontium Sr, yttrium Y,
zirconium Zr, niobium Nb, molybdenum Mo, technetium Tc, ruthenium Ru, rhodium Rh, palladium Pd,
silver Ag, cadmium Cd, indium In, tin Sn, antimony Sb, tellurium Te, iodine I, xenon Xe,
caesium Cs, barium Ba, lanthanum La, cerium Ce, praseodymium Pr, neodymium Nd, promethium Pm,
samarium Sm, europium Eu, gadolinium Gd, terbium Tb, dysprosium Dy, holmium Ho, erbium Er,
thulium Tm, ytterbium Yb, lutetium Lu, hafnium Hf, tantalum Ta, tungsten W, rhenium Re, osmium Os,
iridium Ir, platinum Pt, gold Au, mercury Hg, thallium Tl, lead Pb, bismuth Bi, polonium Po,
astatine At, radon Rn, francium Fr, radium Ra, actinium Ac, thorium Th, protactinium Pa,
uranium U, neptunium Np, plutonium Pu, americium Am, curium Cm, berkelium Bk, californium Cf,
einsteinium Es, fermium Fm, mendelevium Md, nobelium No, lawrencium Lr, rutherfordium Rf,
dubnium Db, seaborgium Sg, bohrium Bh, hassium Hs, meitnerium Mt, darmstadtium Ds, roentgenium Rg,
copernicium Cn, nihonium Nh, flerovium Fl, moscovium Mc, livermorium Lv, tennessine Ts,
oganesson Og
"""

# Letters (of any script), joined by single spaces, hyphens or apostrophes.
_PLAIN = re.compile(r"[^\W\d_]+(?:[ '’ʼ-][^\W\d_]+)*")
_WORD = re.compile(r"[^\W\d_]+")
# Codes that stand for no script or currency: metals, funds, "uncoded", "reserved".
_NOT_SCRIPTS = {"Zinh", "Zmth", "Zsye", "Zsym", "Zxxx", "Zyyy", "Zzzz", "Qaaa", "Qabx"}
_NOT_CURRENCIES = {"XAG", "XAU", "XPD", "XPT", "XTS", "XXX"}
# Directions name subdivisions in many countries, listed or not; the rest are ordinary words.
_NOT_AS_NAMES = {
    "central", "centre", "center", "east", "eastern", "north", "northern", "south", "southern",
    "west", "western", "northeast", "northwest", "southeast", "southwest", "capital", "islands",
    "anus", "coast", "gulf", "male", "mary", "most", "paul", "point", "pool", "reading", "river",
    "rivers", "source",
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact. ``entity`` and ``answer`` are NFC text without articles."""

    family: str
    relation: str
    entity: str
    answer: str

    @property
    def key(self) -> str:
        """A stable name: family/relation/entity."""
        return f"{self.family}/{self.relation}/{self.entity}"


def fold(name: str) -> str:
    """The name without case, accents and punctuation: what must be unique in a family."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return re.sub(r"\W+", " ", bare.casefold()).strip()


def stable_hash(text: str, seed: int = 0) -> int:
    """64 bits that depend on nothing but text and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")


@cache
def popularity(name: str) -> float:
    """How common a name is in English text: wordfreq's Zipf scale, 0 for unseen.

    wordfreq answers for several words about as for the rarest of them; a phrase is rarer
    than its words, so each further word costs a factor of ten (one step of the scale).
    """
    from wordfreq import zipf_frequency

    return max(0.0, zipf_frequency(name, "en", wordlist="best") - len(re.findall(r"[ '-]", name)))


def _heads(names: Iterable[str]) -> Counter[str]:
    """How often each folded name occurs, without what follows a bracket or comma.

    "Congo" next to "Congo, The Democratic Republic of the" is no name to ask about.
    """
    return Counter(fold(re.split(r" [(\[]|, ", name)[0]) for name in names)


def _clean(name: str, longest: int = 26) -> str | None:
    """The name in NFC with plain apostrophes, or None if it is not a plain name."""
    name = unicodedata.normalize("NFC", name).strip().replace("’", "'").replace("ʼ", "'")
    return name if len(name) <= longest and _PLAIN.fullmatch(name) else None


def _countries() -> dict[str, str]:
    """alpha-2 code -> plain common name, for the countries that have one."""
    import pycountry

    names = {c.alpha_2: getattr(c, "common_name", c.name) for c in pycountry.countries}
    heads = _heads(names.values())
    cleaned = {code: _clean(name) for code, name in sorted(names.items())}
    return {code: name for code, name in cleaned.items() if name and heads[fold(name)] == 1}


def _element_facts() -> Iterator[Fact]:
    for number, entry in enumerate(ELEMENTS.replace("\n", " ").split(","), start=1):
        name, symbol = entry.split()
        yield Fact("element", "number", name, str(number))
        yield Fact("element", "symbol", name, symbol)


def _country_facts() -> Iterator[Fact]:
    import pycountry

    for code, name in _countries().items():
        country = pycountry.countries.get(alpha_2=code)
        yield Fact("country", "alpha2", name, code)
        yield Fact("country", "alpha3", name, country.alpha_3)
        yield Fact("country", "numeric", name, country.numeric)


def _currency_facts() -> Iterator[Fact]:
    import pycountry

    for currency in sorted(pycountry.currencies, key=lambda c: c.alpha_3):
        name = _clean(currency.name)
        if name and currency.alpha_3 not in _NOT_CURRENCIES:
            yield Fact("currency", "code", name, currency.alpha_3)
            yield Fact("currency", "numeric", name, currency.numeric)


def _script_facts() -> Iterator[Fact]:
    import pycountry

    for script in sorted(pycountry.scripts, key=lambda s: s.alpha_4):
        if script.alpha_4 in _NOT_SCRIPTS or re.search("variant|alias", script.name):
            continue
        # "Devanagari (Nagari)" and "Modi, Moḍī" give other names of the same script.
        name = _clean(re.split(r" \(|, ", script.name)[0])
        if name:
            yield Fact("script", "code", name, script.alpha_4)
            yield Fact("script", "numeric", name, script.numeric)


def _language_facts() -> Iterator[Fact]:
    """Living languages with one-word names: the best known, then a fixed random choice."""
    import pycountry

    heads = _heads(language.name for language in pycountry.languages)
    kept: list[tuple[str, str]] = []
    for language in pycountry.languages:
        name = _clean(language.name, 13)
        if language.type != "L" or not name or not _WORD.fullmatch(name) or len(name) < 4:
            continue
        if heads[fold(name)] > 1 or fold(name) in _NOT_AS_NAMES:
            continue
        # "Even", "Label", "Adele": a word or a person far more often than the language.
        if popularity(name) >= 3.4 and not hasattr(language, "alpha_2"):
            continue
        kept.append((name, language.alpha_3))
    kept.sort(key=lambda e: (-popularity(e[0]), stable_hash(e[1])))
    for name, code in sorted(kept[:LANGUAGES], key=lambda e: e[1]):
        yield Fact("language", "code", name, code)


def _subdivision_facts() -> Iterator[Fact]:
    """Subdivisions whose name occurs in one place of ISO 3166-2 and is no country's."""
    import pycountry

    countries = _countries()
    country_names = tuple(fold(name) for name in countries.values())
    heads = _heads(place.name for place in pycountry.subdivisions)
    kept = []
    for place in pycountry.subdivisions:
        name = _clean(place.name, 18)
        if not name or len(name) < 4 or name.count(" ") > 1 or place.country_code not in countries:
            continue
        folded = fold(name)
        if heads[folded] > 1 or folded.startswith(country_names):
            continue
        if not name[0].isupper() or _NOT_AS_NAMES & set(folded.split()):
            continue
        kept.append((name, place.country_code, place.code))
    kept.sort(key=lambda e: (-popularity(e[0]), stable_hash(e[2])))
    per_country: Counter[str] = Counter()
    chosen = []
    for entry in kept:
        per_country[entry[1]] += 1
        if per_country[entry[1]] <= SUBDIVISIONS_PER_COUNTRY:
            chosen.append(entry)
    for name, country, _ in sorted(chosen[:SUBDIVISIONS], key=lambda e: e[2]):
        yield Fact("subdivision", "country", name, countries[country])


def drop_ambiguous(candidates: Iterable[Fact]) -> list[Fact]:
    """Without every fact whose entity shares its folded name with another answer."""
    candidates = list(candidates)
    answers: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
    for fact in candidates:
        place = (fact.family, fact.relation, fold(fact.entity))
        answers.setdefault(place, set()).add((fact.entity, fact.answer))
    unclear = {(family, name) for (family, _, name), found in answers.items() if len(found) > 1}
    kept = [f for f in candidates if (f.family, fold(f.entity)) not in unclear]
    return list(dict.fromkeys(kept))


@cache
def _all_facts() -> tuple[Fact, ...]:
    makers = (
        _element_facts,
        _country_facts,
        _currency_facts,
        _script_facts,
        _language_facts,
        _subdivision_facts,
    )
    return tuple(drop_ambiguous(fact for maker in makers for fact in maker()))


def facts() -> list[Fact]:
    """All facts, always in the same order for the same versions of pycountry and wordfreq."""
    return list(_all_facts())
