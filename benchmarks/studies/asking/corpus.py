"""The training corpus of the atlas, made anew, and which of its documents state a question's fact.

The corpus is a function of the recipe alone (``apps/atlas/corpus.py``; the extra ``atlas``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from mlx_hiermem.errors import ConfigError
from mlx_hiermem.evaluation.questions import Question

from .table import Study

_MISSING = "the atlas' corpus needs pycountry and wordfreq; pip install 'mlx-hiermem[atlas]'"


def is_atlas(study: Study) -> bool:
    """Whether a model's questions are those of the atlas' corpus."""
    if study.home.name != "atlas":
        return False
    return [question.prompt for question in study.every] == [one.prompt for one in _held_out()]


def _held_out() -> list:
    try:
        from apps.atlas.corpus import held_out
        from apps.atlas.recipe import Recipe

        return held_out(Recipe().corpus)
    except ImportError:
        raise ConfigError(_MISSING) from None


def atlas_texts() -> Iterator[str]:
    """Every document, with a bar."""
    from apps.atlas.corpus import counts, documents
    from apps.atlas.recipe import Recipe

    config = Recipe().corpus
    total = sum(counts(config))
    for document in tqdm(documents(config), total=total, unit="document", disable=None):
        yield document.text


def atlas_store(only: Sequence[int] | None = None) -> tuple[list[str], list[int]]:
    """The distinct documents, sorted, and the number of the fact that each states.

    Args:
        only: numbers of facts; theirs in every wording, in place of the corpus: for a smoke run.
    """
    from apps.atlas.corpus import documents, fact_documents
    from apps.atlas.recipe import Recipe

    if only is None:
        given = documents(Recipe().corpus)
    else:
        given = (document for number in only for document in fact_documents(number))
    facts = {document.text: document.fact_index for document in given}
    texts = sorted(facts)
    return texts, [facts[text] for text in texts]


def atlas_wordings(study: Study) -> list[list[str]]:
    """Per question of a study the prompts of its fact in the training wordings."""
    from apps.atlas.corpus import fact_documents

    return [[one.prompt for one in fact_documents(i)] for i in fact_numbers(study.questions)]


def fact_numbers(questions: Sequence[Question]) -> list[int]:
    """Per question of the atlas the number of its fact."""
    places = {one.prompt: one.fact_index for one in _held_out()}
    return [places[question.prompt] for question in questions]
