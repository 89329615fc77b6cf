"""By which text the documents of the paper's tasks are routed, on lm-eval's own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mlx_hiermem.cli import main
from mlx_hiermem.errors import InputError
from mlx_hiermem.evaluation.lm_eval import run as run_tasks
from mlx_hiermem.evaluation.lm_eval.routes import TEMPLATES, Routes, shared_words
from tests.tiny import make_tiny_model

#: Where lm-eval keeps the paper's tasks; all its tasks take long to find.
FOLDERS = (
    "lambada super_glue/boolq wsc273 winogrande hellaswag arc triviaqa nq_open piqa openbookqa"
).split()

CHOICES = {"text": ["red", "blue"], "label": ["A", "B"]}

#: Data set -> document number i, in the form that the real one has.
DATA = {
    "EleutherAI/lambada_openai": lambda i: {"text": f"the dog {i} saw the cat"},
    "aps/super_glue": lambda i: {"passage": f"passage {i}.", "question": f"is {i}", "label": 1},
    "rajpurkar/squad": lambda i: {
        "context": f"story {i}.", "question": f"who {i}?", "answers": {"text": ["dog", "a dog"]},
    },
    "lighteval/winograd_wsc": lambda i: {
        "text": f"Dog {i} hit cat since it was bad.", "pronoun": "it",
        "pronoun_loc": len(f"Dog {i} hit cat since "), "options": ["Dog", "cat"], "label": 0,
    },
    "EleutherAI/coqa": lambda i: {
        "story": f"tale {i}.", "questions": {"input_text": ["who?", f"why {i}?"]},
        "answers": {"input_text": ["dog", "fun"]},
        "additional_answers": {"0": {"input_text": ["cat", "for fun"]}},
    },
    "allenai/winogrande": lambda i: {
        "sentence": f"Sue {i} met Ann so _ smiled.", "option1": "Sue", "option2": "Ann",
        "answer": "1",
    },
    "Rowan/hellaswag": lambda i: {
        "ctx_a": f"a man {i}", "ctx_b": "he", "activity_label": "Run",
        "endings": ["runs.", "flies."], "label": "0",
    },
    "allenai/ai2_arc": lambda i: {"question": f"which {i}?", "choices": CHOICES, "answerKey": "A"},
    "mandarjoshi/trivia_qa": lambda i: {"question": f"what {i}", "answer": {"aliases": ["x", "y"]}},
    "google-research-datasets/nq_open": lambda i: {"question": f"when {i}", "answer": ["x"]},
    "baber/piqa": lambda i: {"goal": f"open {i}", "sol1": "pull", "sol2": "eat", "label": 0},
    "allenai/openbookqa": lambda i: {
        "question_stem": f"sun {i} is", "choices": CHOICES, "answerKey": "B",
    },
}  # fmt: skip

#: Task -> its shots, and the text by which document 0 is routed.
EXPECTED = {
    "lambada_openai": (0, "the dog 0 saw the"),
    "boolq": (10, "passage 0.\nis 0"),
    "hiermem_squad": (10, "story 0.\nwho 0?"),
    "wsc273": (0, "Dog 0 hit cat since  was bad."),
    "hiermem_coqa": (0, "tale 0.\nwhy 0?"),
    "winogrande": (0, "Sue 0 met Ann so smiled."),
    "hellaswag": (0, "Run: a man 0 He"),
    "arc_easy": (10, "which 0?"),
    "arc_challenge": (10, "which 0?"),
    "triviaqa": (3, "what 0"),
    "nq_open": (5, "when 0"),
    "piqa": (10, "open 0"),
    "openbookqa": (0, "sun 0 is"),
}


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """lm-eval's definitions of the paper's tasks, with data sets made here."""

    def load_dataset(path, name=None, **options):
        assert not options.get("trust_remote_code")
        splits = {"train": range(100, 112), "validation": range(2), "test": range(2)}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([DATA[path](i) for i in numbers])
             for split, numbers in splits.items()}
        )  # fmt: skip

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [run_tasks.GROUPS, *(root / folder for folder in FOLDERS)]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        run_tasks, "_manager", lambda *_: TaskManager(include_path=folders, include_defaults=False)
    )


def test_the_papers_tasks_their_shots_and_what_is_routed():
    chosen = run_tasks.load_tasks(["CK", "SK"])
    assert chosen.groups == {"CK": list(EXPECTED)[:6], "SK": list(EXPECTED)[6:]}
    routes = Routes(tasks=chosen.tasks)
    for name, (shots, text) in EXPECTED.items():
        task = chosen.tasks[name]
        assert task.get_config("num_fewshot") == shots and name in TEMPLATES
        task.set_fewshot_seed(seed=0)
        task.build_all_requests(limit=2)
        own = [request for request in task.instances if request.doc_id == 0]
        assert len(own) == (1 if task.OUTPUT_TYPE in ("generate_until", "loglikelihood") else 2)
        assert set(routes.texts(own)) == {text}
        examples = sum(str(i) in own[0].args[0] for i in range(100, 112))
        assert examples == shots, name
        if task.OUTPUT_TYPE == "generate_until":
            assert own[0].args[1]["max_gen_toks"] == 32


def test_the_papers_tasks_run(tmp_path, capsys):
    folder = make_tiny_model(tmp_path)
    command = f"evaluate --model {folder} --task lm-eval --tasks CK,SK --limit 1 --json"
    assert main([*command.split(), "--memory", "fetched"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tasks"]) == list(EXPECTED)
    main_metrics = [found["tasks"][name]["metric"] for name in EXPECTED]
    assert main_metrics[:6] == ["acc", "acc", "exact_match", "acc", "exact_match", "acc"]
    assert main_metrics[6:9] == main_metrics[11:] + ["acc_norm"] == 3 * ["acc_norm"]
    assert main_metrics[9:11] == 2 * ["exact_match"]
    for group in ("CK", "SK"):
        assert 0 <= found["groups"][group]["fetched"] <= 1
    for name, (shots, _) in EXPECTED.items():
        assert found["tasks"][name]["shots"] == shots
        assert found["tasks"][name]["routed_on"] == TEMPLATES[name]


def test_our_own_reading_tasks_read_as_lm_evals():
    chosen = run_tasks.load_tasks(["hiermem_coqa", "hiermem_squad"])
    coqa, squad = chosen.tasks["hiermem_coqa"], chosen.tasks["hiermem_squad"]
    doc = coqa.validation_docs()[0]
    assert coqa.doc_to_text(doc) == "tale 0.\n\nQ: who?\n\nA: dog\n\nQ: why 0?\n\nA:"
    assert coqa.doc_to_target(doc) == ["fun", "for fun"]
    assert coqa.doc_to_target({**doc, "additional_answers": None}) == ["fun"]
    doc = squad.validation_docs()[0]
    assert squad.doc_to_text(doc) == "Context: story 0.\nQuestion: who 0?\nAnswer:"
    for text, right in (("A Dog!", 1), ("dogs", 0), ("the dog", 1), ("cat", 0)):
        assert squad.process_results(doc, [text])["exact_match"] == right, text


def request_of(name="t", context="", kind="loglikelihood", doc=None, idx=0):
    return Instance(kind, doc or {"a": 1}, (context, " x"), idx, metadata=(name, 0, 1))


def test_of_an_unknown_task_what_its_contexts_share_is_routed():
    contexts = ["the dog sees", "the door is"]
    requests = [request_of(context=context, idx=i) for i, context in enumerate(contexts)]
    assert Routes().texts(requests) == ["the ", "the "]
    assert Routes().texts([*requests, request_of(context="")]) == ["the "] * 3
    assert Routes({"t": "{{a}}"}).texts(requests) == ["1", "1"]
    rolling = [request_of(context="a whole document", kind="loglikelihood_rolling")]
    assert Routes().texts(rolling) == ["a whole document"]
    with pytest.raises(InputError, match="task t, document 0: there is no text to route; name one"):
        Routes().texts([request_of(context="a b"), request_of(context="c d")])
    with pytest.raises(InputError, match=r"the template '{{b}}' .* its fields are a; give --route"):
        Routes({"t": "{{b}}"}).texts(requests)


@pytest.mark.parametrize(
    "texts, shared",
    [
        (["same"], "same"),
        (["the dog", "the door"], "the "),
        (["the dog", "the dog sees"], "the dog"),
        (["the dog ", "the dogs"], "the "),
        (["a", "b"], ""),
        ([], ""),
    ],
)
def test_shared_words(texts, shared):
    assert shared_words(texts) == shared
