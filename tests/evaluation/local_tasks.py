"""Small tasks of lm-eval in local files, one of each type, which need no network."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import random_texts

#: Two documents are for few-shot examples, the others are asked.
SHOTS, ASKED = 2, 4

FILES = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "open": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{written}}"
generation_kwargs:
  until: ["!", "e"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
    "schema": """
output_type: multiple_choice
doc_to_text: answer
doc_to_choice: "{{[question + ' ' + choices[0], question + ' ' + choices[1]]}}"
doc_to_target: "is {{written}}"
metric_list:
  - metric: acc
""",
}

COMMON = """
task: my_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
  cache_dir: {folder}/cache
training_split: train
test_split: test
fewshot_config: {{split: train, sampler: first_n}}
metadata: {{version: 1.0}}
"""


def documents() -> list[dict]:
    """Documents with the fields question, choices, answer and written."""
    words = iter(random_texts(4 * (SHOTS + ASKED), seed=5))
    found = []
    for i in range(SHOTS + ASKED):
        question, *choices = next(words), *(next(words).split()[0] for _ in range(3))
        found.append(
            {"question": question, "choices": choices, "answer": i % 2, "written": choices[2]}
        )
    return found


GROUP = """
group: mine
task:
  - task: my_choice
    num_fewshot: 2
  - my_open
"""


def write_tasks(folder: Path, found: list[dict]) -> Path:
    """Write the tasks my_NAME, NAME of :data:`FILES`, the group ``mine``, and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(GROUP, encoding="utf-8")
    for name, part in (("train", found[:SHOTS]), ("test", found[SHOTS:])):
        lines = "".join(json.dumps(document) + "\n" for document in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(
            COMMON.format(name=name, folder=folder) + text, encoding="utf-8"
        )
    return folder
