"""By which text each document of a task is routed (the paper's Appendix B).

Multiple choice is routed by the question alone, language modelling by the context, a schema by the
text that all its choices share, a perplexity by the whole document; never by the few-shot examples.
Every request of a document gets the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.utils import apply_template

from ...errors import InputError, one_line

_LAST_WORD_OFF = "{{text.split(' ')[:-1]|join(' ')}}"

_COQA = "{{story}}\n{{questions.input_text[-1]}}"

#: lm-eval's name of a task -> Jinja template over the fields of its documents.
TEMPLATES = {
    # language modelling: the context
    "lambada_openai": _LAST_WORD_OFF,
    "lambada_standard": _LAST_WORD_OFF,
    # reading: the passage and the question, which are the context
    "boolq": "{{passage}}\n{{question}}",
    "hiermem_squad": "{{context}}\n{{question}}",
    "squadv2": "{{context}}\n{{question}}",
    "coqa": _COQA,
    "hiermem_coqa": _COQA,
    # schema: what the choices share, which is all but the pronoun or the gap
    "wsc273": "{{text[:pronoun_loc]}}{{text[pronoun_loc + pronoun|length:]}}",
    "winogrande": "{{sentence|replace(' _', '')|replace('_', '')}}",
    # multiple choice and open questions: the question
    "hellaswag": "{{query}}",
    "arc_easy": "{{question}}",
    "arc_challenge": "{{question}}",
    "triviaqa": "{{question}}",
    "nq_open": "{{question}}",
    "piqa": "{{goal}}",
    "openbookqa": "{{question_stem}}",
}


class Routes:
    """The text to route of each document.

    A task's text comes from, the first that there is: ``templates``; ``route_on`` in the
    ``metadata`` of the task's file; :data:`TEMPLATES`; what the task itself calls the document's
    text, without choices and few-shot examples.

    Args:
        templates: task -> Jinja template over the fields of a document.
        tasks: the tasks that run. Of a task that is not among them the contexts of its requests are
            all that is known: their common beginning is routed, few-shot examples and all.
    """

    def __init__(
        self,
        templates: Mapping[str, str] | None = None,
        tasks: Mapping[str, Task] | None = None,
    ) -> None:
        self._templates = dict(templates or {})
        self._tasks = dict(tasks or {})

    def template(self, task: str) -> str | None:
        """The template of a task, or None where its text is found without one."""
        if task in self._templates:
            return self._templates[task]
        known = self._tasks.get(task)
        metadata = (known.get_config("metadata") if known is not None else None) or {}
        own = metadata.get("route_on") if isinstance(metadata, dict) else None
        return own if isinstance(own, str) else TEMPLATES.get(task)

    def texts(self, requests: Sequence[Instance]) -> list[str]:
        """The text to route for each request; the same for all requests of a document.

        Raises:
            InputError: a template does not fit the document, or its text is empty.
        """
        documents: dict[tuple[str | None, int | None], list[Instance]] = {}
        for request in requests:
            documents.setdefault((request.task_name, request.doc_id), []).append(request)
        found = {}
        for key, of_document in documents.items():
            found[key] = self._text(of_document)
            if not found[key].strip():
                raise InputError(
                    f"task {key[0]}, document {key[1]}: there is no text to route; name one with "
                    f"--route-on '{key[0]}={{{{FIELD}}}}', FIELD a field of its documents"
                )
        return [found[request.task_name, request.doc_id] for request in requests]

    def _text(self, requests: Sequence[Instance]) -> str:
        first = requests[0]
        template = self.template(first.task_name)
        if template is not None:
            try:
                return apply_template(template, first.doc)
            except Exception as error:  # Jinja raises what the expressions in it raise
                reason = one_line(f"{type(error).__name__}: {error}")
                raise InputError(
                    f"task {first.task_name}, document {first.doc_id}: the template "
                    f"{template[:60]!r} that says what is routed does not fit ({reason}); its "
                    f"fields are {', '.join(first.doc)[:200]}; give --route-on TASK=TEMPLATE"
                ) from None
        if first.request_type == "loglikelihood_rolling":
            return first.args[0]
        task = self._tasks.get(first.task_name)
        return self._shared(requests) if task is None else self._own(task, first.doc, requests)

    def _own(self, task: Task, doc: Any, requests: Sequence[Instance]) -> str:
        """What a task calls the text of a document."""
        if getattr(task, "multiple_input", 0):  # a schema: the choices are the contexts
            return shared_words(task.doc_to_choice(doc)) + str(task.doc_to_target(doc))
        text = task.doc_to_text(doc)
        return text if isinstance(text, str) else self._shared(requests)

    @staticmethod
    def _shared(requests: Sequence[Instance]) -> str:
        contexts = [request.args[0] for request in requests]
        return shared_words([context for context in contexts if context])


def shared_words(texts: Sequence[str]) -> str:
    """The words with which all texts begin, with the space that follows them."""
    shared = commonprefix(list(texts))
    if all(text == shared or text[len(shared)].isspace() for text in texts):
        return shared
    return re.sub(r"\S+$", "", shared)  # the texts part in the middle of a word
