"""Wordings and corpus: Zipf counts, equal use of wordings, nothing held out in training."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice

import pytest

from apps.atlas.corpus import (
    CorpusConfig,
    Document,
    buckets,
    counts,
    documents,
    fact_documents,
    held_out,
)
from apps.atlas.facts import Fact, facts, popularity
from apps.atlas.wordings import (
    HELD_OUT_WORDINGS,
    TRAINING,
    held_out_wording,
    training_wordings,
)

# Its own numbers, so that tuning the recipe's does not touch the tests.
CONFIG = CorpusConfig(documents_top=6_000, offset=10, exponent=1.0, minimum=4)


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(documents(CONFIG))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text))


def test_element_wordings_read_as_english() -> None:
    fact = Fact("element", "number", "hafnium", "72")
    assert [w.render(fact) for w in training_wordings(fact)] == [
        ("Hafnium has the atomic number", " 72."),
        ("What is the atomic number of hafnium?", " 72."),
        ("Hafnium's atomic number is", " 72."),
        ("Atomic number of hafnium:", " 72."),
        ("The atomic number that belongs to hafnium is", " 72."),
        ("For hafnium, the atomic number is", " 72."),
    ]
    assert held_out_wording(fact).render(fact) == ("The atomic number of hafnium is", " 72.")


def test_articles_and_possessives() -> None:
    country = Fact("country", "alpha2", "Netherlands", "NL")
    assert training_wordings(country)[2].render(country) == (
        "The Netherlands' two-letter country code is",
        " NL.",
    )
    assert held_out_wording(country).render(country)[0] == (
        "The two-letter country code of the Netherlands is"
    )
    place = Fact("subdivision", "country", "Texas", "United States")
    assert training_wordings(place)[0].render(place) == (
        "Texas lies in the country of",
        " the United States.",
    )


def test_every_relation_has_wordings() -> None:
    relations = {(f.family, f.relation) for f in facts()}
    assert set(TRAINING) == set(HELD_OUT_WORDINGS) == relations
    assert all(len(set(texts)) == 6 for texts in TRAINING.values())


def test_prompts_name_the_entity(corpus: list[Document]) -> None:
    known = facts()
    for document in corpus:
        fact = known[document.fact_index]
        assert document.text.startswith(document.prompt + " ")
        assert fact.entity.casefold() in document.prompt.casefold()
        assert document.text.endswith(f"{fact.answer}.")


def test_no_held_out_prompt_in_any_document(corpus: list[Document]) -> None:
    by_fact: dict[int, set[str]] = defaultdict(set)
    for document in corpus:
        by_fact[document.fact_index].add(document.text.casefold())
    questions = held_out(CONFIG)
    for question in questions:
        prompt = question.prompt.casefold()
        assert not any(prompt in text for text in by_fact[question.fact_index])
    # Nor its frame with any other name in it.
    # "?" and ":" end the prompt of a training text: "... code of Iceland? IS." is no "is".
    frames = [
        re.compile(re.escape(template.casefold()).replace(r"\{x\}", "[^?:]+") + r"\b")
        for template in HELD_OUT_WORDINGS.values()
    ]
    assert frames[0].search("so the atomic number of x is 1.")
    texts = {d.text.casefold() for d in corpus}
    assert not [text for text in texts if any(frame.search(text) for frame in frames)]


def test_held_out_words_are_trained() -> None:
    trained = set().union(*(_words(t.replace("{", " ")) for ts in TRAINING.values() for t in ts))
    # "The" at a start comes from entities with an article: "The Swiss Franc has ...".
    trained.add("The")
    for template in HELD_OUT_WORDINGS.values():
        assert _words(template.replace("{x}", "")) <= trained


def test_articles_train_the_word_the(corpus: list[Document]) -> None:
    assert sum(d.text.startswith("The ") for d in corpus) > 300


def test_counts_are_zipf_and_equal_within_an_entity() -> None:
    number = counts(CONFIG)
    per_entity: dict[tuple[str, str], set[int]] = defaultdict(set)
    for fact, count in zip(facts(), number, strict=True):
        per_entity[fact.family, fact.entity].add(count)
    assert all(len(values) == 1 for values in per_entity.values())
    ranked = sorted((values.pop() for values in per_entity.values()), reverse=True)
    expected = [max(4, round(6_000 / (rank + 10))) for rank in range(len(ranked))]
    assert ranked == expected


def test_exponent_flattens_the_counts() -> None:
    flat, steep = (sorted(counts(replace(CONFIG, exponent=s, minimum=1))) for s in (0.5, 1.0))
    assert flat[0] / flat[-1] > 10 * steep[0] / steep[-1]
    assert max(counts(replace(CONFIG, exponent=0.0))) == min(counts(replace(CONFIG, exponent=0.0)))


def test_default_corpus_is_a_long_tail() -> None:
    number = counts(CorpusConfig())
    assert 50_000 <= sum(number) <= 150_000
    assert max(number) > 50 * min(number)


def test_popular_names_have_more_documents() -> None:
    number = dict(zip([f.key for f in facts()], counts(CONFIG), strict=True))
    popular, rare = "country/alpha2/Germany", "country/alpha2/Kiribati"
    assert popularity("Germany") > popularity("Kiribati")
    assert number[popular] > number[rare] >= CONFIG.minimum


def test_documents_follow_the_counts_and_wordings(corpus: list[Document]) -> None:
    times = Counter(d.fact_index for d in corpus)
    assert tuple(times[index] for index in range(len(facts()))) == counts(CONFIG)
    used = Counter((d.fact_index, d.wording) for d in corpus)
    for index in range(len(facts())):
        uses = [used[index, wording] for wording in range(6)]
        assert max(uses) - min(uses) <= 1
        assert sum(use > 0 for use in uses) == min(6, times[index])
    totals = Counter(d.wording for d in corpus)
    assert max(totals.values()) < 1.05 * min(totals.values())


def test_documents_depend_on_the_seed_alone(corpus: list[Document]) -> None:
    head = corpus[:200]
    assert list(islice(documents(CONFIG), 200)) == head
    assert list(islice(documents(replace(CONFIG, seed=1)), 200)) != head


def test_documents_are_shuffled(corpus: list[Document]) -> None:
    first, second = corpus[: len(corpus) // 2], corpus[len(corpus) // 2 :]
    families = [Counter(facts()[d.fact_index].family for d in half) for half in (first, second)]
    assert all(abs(families[0][f] - families[1][f]) < 0.1 * families[0][f] for f in families[0])


def test_fact_documents_are_the_views_of_one_fact(corpus: list[Document]) -> None:
    index = max(range(len(facts())), key=counts(CONFIG).__getitem__)
    assert len(fact_documents(index)) == 6
    assert set(fact_documents(index)) == {d for d in corpus if d.fact_index == index}


def test_buckets_are_equal_and_ordered() -> None:
    number, groups = counts(CONFIG), buckets(CONFIG)
    assert sorted(i for group in groups for i in group) == list(range(len(facts())))
    assert len(groups) == 5 and max(map(len, groups)) - min(map(len, groups)) <= 1
    for earlier, later in zip(groups, groups[1:], strict=False):
        assert min(number[i] for i in earlier) >= max(number[i] for i in later)
    assert number[groups[4][0]] == CONFIG.minimum


def test_held_out_questions() -> None:
    questions = held_out(CONFIG)
    assert [q.fact_index for q in questions] == list(range(len(facts())))
    assert len({q.prompt for q in questions}) == len(questions)
    assert all(
        q.continuation.startswith(" ") and q.continuation.endswith(f"{q.answer}.")
        for q in questions
    )
    assert tuple(q.count for q in questions) == counts(CONFIG)
