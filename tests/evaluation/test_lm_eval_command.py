"""``evaluate --task lm-eval`` on local tasks: its figures against loops written out here."""

from __future__ import annotations

import json
import math
import shutil
import sys

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from mlx_lm import evaluate as mlx_lm_evaluate

from mlx_hiermem import load
from mlx_hiermem.anchors import load_anchor, load_anchor_tokenizer
from mlx_hiermem.cli import main
from mlx_hiermem.evaluation.lm_eval import run as run_tasks
from mlx_hiermem.evaluation.lm_eval.routes import Routes
from mlx_hiermem.making import make_model
from tests.evaluation.local_tasks import ASKED, SHOTS, documents, write_tasks
from tests.tiny import make_tiny_model

MEMORIES = ["none", "generic", "fetched"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def asked(document):
    return f"Q: {document['question']}\nA:"


def answered(lm, context, memory, route_on):
    pieces = lm.stream(context, memory, 6, route_on=route_on)
    return "".join(piece.text for piece in pieces).split("!")[0].split("e")[0]


@pytest.fixture(scope="module")
def found(lm):
    """The documents; what is written in some is what the model answers with the generic memory."""
    found = documents()
    for document in found[SHOTS + 1 :: 2]:
        document["written"] = answered(lm, asked(document), "generic", "") or "-"
    return found


@pytest.fixture(scope="module")
def tasks(found, tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), found)


@pytest.fixture
def run(folder, tasks, capsys):
    def command(*arguments):
        options = ["--model", folder, "--task", "lm-eval", "--task-path", tasks, *arguments]
        assert main(["evaluate", *map(str, options)]) == 0
        return capsys.readouterr().out

    return command


def check(result, name, metric, memory, values, of_all=np.mean):
    """A figure is ``of_all`` of the documents' values, and its error that of a mean, if it is."""
    figure = result["tasks"][name]["metrics"][metric][memory]
    assert figure["value"] == pytest.approx(of_all(values), rel=1e-5)
    if of_all is np.mean:
        assert figure["stderr"] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)
    else:
        assert figure["stderr"] is None


@pytest.mark.parametrize("shots", [0, 2])
def test_each_type_against_a_written_out_loop(lm, found, run, shots):
    names = ["choice", "cloze", "open", "schema", "rolling"]
    options = ["--tasks", ",".join(f"my_{name}" for name in names), "--num-fewshot", shots]
    result = json.loads(run(*options, "--batch-size", 3, "--json"))
    assert result["memories"] == MEMORIES and list(result["tasks"]) == [f"my_{n}" for n in names]
    assert all(task["n"] == ASKED and task["shots"] == shots for task in result["tasks"].values())
    examples, test = found[:shots], found[SHOTS:]
    for memory in MEMORIES:
        # choice: the likeliest choice, by itself and per character
        before = "".join(f"{asked(d)} {d['choices'][d['answer']]}\n\n" for d in examples)
        right, right_norm = [], []
        for d in test:
            scores = [
                lm.score(before + asked(d), f" {c}", memory, asked(d))[0] for c in d["choices"]
            ]
            per_letter = [s / len(c) for s, c in zip(scores, d["choices"], strict=True)]
            right.append(float(np.argmax(scores) == d["answer"]))
            right_norm.append(float(np.argmax(per_letter) == d["answer"]))
        check(result, "my_choice", "acc", memory, right)
        check(result, "my_choice", "acc_norm", memory, right_norm)

        # cloze: the log-probability of the last word
        def words(d):
            return f" {d['choices'][d['answer']]}"

        before = "".join(f"{d['question']} {words(d)}\n\n" for d in examples)
        pairs = [lm.score(before + d["question"], words(d), memory, d["question"]) for d in test]
        check(result, "my_cloze", "acc", memory, [float(greedy) for _, greedy in pairs])
        scores = [logprob for logprob, _ in pairs]
        check(
            result, "my_cloze", "perplexity", memory, scores, lambda s: math.exp(-sum(s) / len(s))
        )

        # open: exactly what is written
        before = "".join(f"{asked(d)} {d['written']}\n\n" for d in examples)
        texts = [answered(lm, before + asked(d), memory, asked(d)) for d in test]
        same = [float(text == d["written"]) for text, d in zip(texts, test, strict=True)]
        check(result, "my_open", "exact_match", memory, same)
        if shots == 0 and memory == "generic":
            assert sum(same) == 2

        # schema: the beginning with which the common end is likelier
        before = "".join(
            f"{d['question']} {d['choices'][d['answer']]} is {d['written']}\n\n" for d in examples
        )
        right = []
        for d in test:
            end, route = f" is {d['written']}", f"{d['question']} is {d['written']}"
            scores = [
                lm.score(f"{before}{d['question']} {c}", end, memory, route)[0]
                for c in d["choices"][:2]
            ]
            right.append(float(np.argmax(scores) == d["answer"]))
        check(result, "my_schema", "acc", memory, right)

        # rolling: the whole document, which has no few-shot examples
        texts = [f"{d['question']} {d['choices'][0]}" for d in test]
        total = sum(-math.log(lm.perplexity([t], memory)) * (len(t) - 1) for t in texts)
        for metric, units in (
            ("word_perplexity", sum(len(t.split()) for t in texts)),
            ("byte_perplexity", sum(map(len, texts))),
        ):
            check(result, "my_rolling", metric, memory, [total], lambda v, n=units: math.exp(-v[0] / n))  # fmt: skip  # noqa: E501


def test_without_a_memory_the_figures_are_mlx_lms_to_the_bit(folder, run, tasks, monkeypatch):
    names = [f"my_{name}" for name in ("choice", "cloze", "open", "schema", "rolling")]
    options = ["--num-fewshot", 1, "--limit", 3, "--batch-size", 2, "--memory", "none", "--json"]
    result = json.loads(run("--tasks", ",".join(names), *options))
    anchor, config = load_anchor(folder)
    bare = anchor, load_anchor_tokenizer(folder, config)
    monkeypatch.setattr(mlx_lm_evaluate, "load", lambda *_, **__: bare)
    expected = simple_evaluate(
        mlx_lm_evaluate.MLXLM("given", batch_size=2),
        tasks=names,
        num_fewshot=1,
        limit=3,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for name in names:
        metrics = result["tasks"][name]["metrics"]
        assert metrics
        for metric, values in metrics.items():
            assert values["none"]["value"] == expected[name][f"{metric},none"]


def test_a_group_has_the_mean_of_its_main_metrics(run, tmp_path):
    output = tmp_path / "result.json"
    memories = ["--memory", "generic,blocked"]
    options = ["--tasks", "mine", *memories, "--limit", 3, "--output", output]
    result = json.loads(run(*options, "--json"))
    assert json.loads(output.read_text()) == result and result["limit"] == 3
    choice, written = result["tasks"]["my_choice"], result["tasks"]["my_open"]
    assert (choice["metric"], choice["shots"], choice["n"]) == ("acc_norm", 2, 3)
    assert (written["metric"], written["shots"]) == ("exact_match", 0)
    for memory in ("generic", "blocked"):
        mean = np.mean(
            [task["metrics"][task["metric"]][memory]["value"] for task in (choice, written)]
        )
        assert result["groups"]["mine"][memory] == pytest.approx(mean)
    text = run(*options)
    rows = [line.split() for line in text.splitlines()]
    assert ["task", "metric", "n", "shots", "generic", "blocked"] in rows
    figure = choice["metrics"]["acc"]["generic"]
    row = next(row for row in rows if row[:2] == ["my_choice", "acc"])
    assert row[2:6] == ["3", "2", f"{figure['value']:.4f}", f"±{figure['stderr']:.4f}"]
    assert ["mine", "2"] == next(row for row in rows if row[:1] == ["mine"])[:2]


def test_the_text_that_is_routed_can_be_chosen(lm, found, run, tasks, tmp_path):
    def scores(*options):
        result = json.loads(run("--tasks", "my_cloze", "--memory", "fetched", "--json", *options))
        task = result["tasks"]["my_cloze"]
        return task["routed_on"], task["metrics"]["perplexity"]["fetched"]["value"]

    def expected(key):
        total = [lm.score(d["question"], f" {d['choices'][d['answer']]}", "fetched", key(d))[0] for d in found[SHOTS:]]  # fmt: skip  # noqa: E501
        return pytest.approx(math.exp(-np.mean(total)), rel=1e-5)

    assert scores() == (None, expected(lambda d: d["question"]))
    template = "{{choices[1]}} {{written}}"
    other = expected(lambda d: f"{d['choices'][1]} {d['written']}")
    assert scores("--route-on", f"my_cloze={template}") == (template, other)
    copy = shutil.copytree(tasks, tmp_path / "copy")
    file = copy / "cloze.yaml"
    file.write_text(
        file.read_text().replace("version: 1.0}", f"version: 1.0, route_on: '{template}'}}")
    )
    assert scores("--task-path", str(copy)) == (template, other)


def test_each_memory_sees_the_same_examples_and_the_seed_draws_them(run, tasks, tmp_path):
    copy = shutil.copytree(tasks, tmp_path / "copy")
    file = copy / "cloze.yaml"
    file.write_text(file.read_text().replace("first_n", "default"))

    def perplexity(memories, seed):
        options = ["--num-fewshot", 1, "--memory", memories, "--seed", seed, "--json"]
        result = json.loads(run("--task-path", copy, "--tasks", "my_cloze", *options))
        return result["tasks"]["my_cloze"]["metrics"]["perplexity"]["none"]["value"]

    assert perplexity("none", 0) == perplexity("generic,none", 0)
    assert len({perplexity("none", seed) for seed in range(4)}) > 1


def test_without_a_template_a_task_says_itself_what_is_routed(found, tasks):
    expected = {
        "my_choice": asked,
        "my_open": asked,
        "my_cloze": lambda d: d["question"],
        "my_rolling": lambda d: f"{d['question']} {d['choices'][0]}",
        "my_schema": lambda d: f"{d['question']} is {d['written']}",
    }
    chosen = run_tasks.load_tasks(list(expected), tasks)
    routes = Routes(tasks=chosen.tasks)
    for name, text in expected.items():
        task = chosen.tasks[name]
        task.set_config("num_fewshot", 2)
        task.set_fewshot_seed(0)
        task.build_all_requests()
        texts = routes.texts(task.instances)
        assert set(texts) == {text(d) for d in found[SHOTS:]} and len(texts) == len(task.instances)


def test_a_task_that_says_no_examples_keeps_that(run, tasks, tmp_path):
    copy = shutil.copytree(tasks, tmp_path / "copy")
    with open(copy / "cloze.yaml", "a") as file:
        file.write("num_fewshot: 0\n")
    options = ["--task-path", copy, "--num-fewshot", 2, "--memory", "none", "--json"]
    found = json.loads(run("--tasks", "my_cloze,my_choice", *options))["tasks"]
    assert (found["my_cloze"]["shots"], found["my_choice"]["shots"]) == (0, 2)


def test_documents_longer_than_the_context_are_told(run, tasks, tmp_path):
    copy = shutil.copytree(tasks, tmp_path / "copy")
    file = copy / "test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["question"] = "word " * 60
    for path in copy.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(copy)))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--task-path", str(copy), "--tasks", "my_rolling,my_choice", "--memory", "none"]
    text = run(*options)
    for name in ("my_rolling", "my_choice"):
        assert f"{name}: 1 of {ASKED} documents are longer than the model's context" in text


def refused(capsys, folder, *arguments):
    assert (
        main(["evaluate", "--model", str(folder), "--task", "lm-eval", *map(str, arguments)]) == 2
    )
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert captured.out == "" and line.startswith("mlx_hiermem: error: ")
    return line


BAD = [
    ([], "--task lm-eval needs --tasks"),
    (["--tasks", ","], "there are no tasks to run"),
    (["--tasks", "my_choice", "--memory", "some"], "--memory: 'some' is none"),
    (["--tasks", "my_choice", "--batch-size", "0"], "--batch-size is 0"),
    (["--tasks", "my_choice", "--num-fewshot", "-1"], "--num-fewshot is -1"),
    (["--tasks", "my_choice", "--max-tokens", "0"], "--max-tokens is 0"),
    (["--tasks", "my_choice", "--route-on", "x"], "--route-on x: expected TASK=TEMPLATE"),
    (["--tasks", "my_choice", "--route-on", "x={{y}}"], "--route-on x: no such task runs"),
    (["--tasks", "my_choice", "--text", "x"], "--text FILE names the documents"),
    (["--tasks", "my_choice", "--output", "missing/x"], "--output missing/x"),
    (
        ["--tasks", "my_choice", "--route-on", "my_choice={{nothing}}"],
        "task my_choice, document 0: the template '{{nothing}}'",
    ),
    (
        ["--tasks", "my_choice", "--route-on", "my_choice=  {{choices[9]|default('')}}"],
        "task my_choice, document 0: there is no text to route",
    ),
    (["--tasks", "my_choice", "--num-fewshot", "9"], "task my_choice: no request can be built"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_wrong_use_is_one_line(folder, tasks, capsys, arguments, message):
    assert message in refused(capsys, folder, "--task-path", tasks, *arguments)


def test_bad_task_files_are_one_line(folder, tasks, tmp_path, capsys):
    options = ("--tasks", "my_choice", "--task-path")
    assert "nowhere: no such folder" in refused(capsys, folder, *options, "nowhere")
    copy = shutil.copytree(tasks, tmp_path / "copy")
    file = copy / "choice.yaml"
    for text, message in (
        (file.read_text().replace("{{question}}", "{{nothing}}"), "could not be loaded"),
        (file.read_text().replace("test.jsonl", "none.jsonl"), "could not be loaded"),
        (file.read_text().replace("multiple_choice", "magic"), "could not be loaded"),
    ):
        file.write_text(text)
        assert f"task my_choice: {message}" in refused(capsys, folder, *options, copy)
        shutil.copy(tasks / "choice.yaml", file)


def test_options_of_this_task_are_refused_by_others(folder, capsys):
    for options in (["--tasks", "CK"], ["--memory", "none"], ["--route-on", "a=b"]):
        assert main(["evaluate", "--model", str(folder), "--task", "routing", *options]) == 2
        error = capsys.readouterr().err
        assert f"{options[0]} is an option of --task lm-eval alone" in error


def test_a_bank_without_a_tree_has_no_fetched_memory(folder, tasks, tmp_path, capsys):
    bare = make_model(folder, tmp_path / "bare", (4, 2), branching=3, fresh_memory=True).folder
    options = ("--tasks", "my_cloze", "--task-path", tasks)
    assert "this bank has no tree" in refused(capsys, bare, *options)
    memories = ["--memory", "none,generic", "--json"]
    command = ["evaluate", "--model", bare, "--task", "lm-eval", *options, *memories]
    assert main([*map(str, command)]) == 0
    assert json.loads(capsys.readouterr().out)["memories"] == ["none", "generic"]
    shutil.rmtree(bare / "memory")
    assert "expected a memory bank" in refused(capsys, bare, *options)


def test_an_unknown_task_is_one_line(folder, tasks, monkeypatch, capsys):
    own = run_tasks.GROUPS
    monkeypatch.setattr(run_tasks, "_manager", lambda _, folders: TaskManager(
        include_path=[own, *folders], include_defaults=False))  # fmt: skip
    line = refused(capsys, folder, "--tasks", "mine,my_choise", "--task-path", tasks)
    assert "task 'my_choise' is neither lm-eval's nor" in line and "near it are my_choice" in line


def test_without_lm_eval_it_says_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused(capsys, folder, "--tasks", "CK")
    assert "pip install 'mlx-hiermem[eval]'" in line
