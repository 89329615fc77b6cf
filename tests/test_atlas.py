"""The model that ships, as a user meets it: true answers that come out of fetched blocks."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest

from apps.atlas.corpus import CorpusConfig, documents
from mlx_hiermem import load
from mlx_hiermem.evaluation import facts, routing
from mlx_hiermem.models import find_model
from mlx_hiermem.training.trainer import parameter_count

HAFNIUM = "The atomic number of hafnium is"


@pytest.fixture(scope="module")
def atlas():
    return load("atlas")


@pytest.fixture(scope="module")
def questions():
    return facts.read_questions(find_model("atlas") / facts.QUESTIONS_FILE)[0]


@pytest.fixture(scope="module")
def hits(atlas, questions):
    """Every sixth question of the rarest bucket, under all conditions."""
    rarest = [question for question in questions if question.bucket == 4][::6]
    control = facts.load_control(atlas, find_model("atlas") / facts.CONTROL_FILE)
    return {name: right.mean() for name, right in facts.answer(atlas, rarest, control).items()}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_line_answers_from_fetched_blocks(atlas):
    done = run("generate", "--model", "atlas", "--prompt", HAFNIUM, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["text"].strip() == "72."
    assert report["memory"] == "fetched"
    assert tuple(report["path"]) == atlas.route(HAFNIUM).ids
    config = atlas.bank.config
    assert [block["bytes"] for block in report["fetch"]["blocks"]] == [
        config.block_bytes(level) for level in config.memory_levels
    ]
    assert report["fetch"]["bytes"] == config.fetch_size() * 2  # bfloat16


@pytest.mark.parametrize("memory", ["none", "generic"])
def test_the_same_call_works_without_the_fetched_memory_and_says_so(memory):
    done = run("generate", "--prompt", HAFNIUM, "--memory", memory, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"] == memory


def test_sizes_are_those_of_the_design(atlas):
    folder = find_model("atlas")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 20_000_000
    anchor = parameter_count(atlas.model.anchor)
    assert 0.08 <= atlas.bank.config.fetch_size() / anchor <= 0.12
    assert len(atlas.bank.config.memory_levels) >= 2
    assert atlas.bank.verify()


def test_the_rarest_facts_come_out_of_the_memory(hits):
    assert hits["fetched"] >= 0.83
    assert hits["fetched"] - hits["generic"] >= 0.5
    assert hits["fetched"] - hits["anchor_same_tokens"] >= 0.5
    assert max(hits["wrong"], hits["blocked"]) <= hits["generic"]


def test_questions_land_where_their_facts_were_trained(atlas, questions):
    shares = routing.summary(routing.landed(atlas, questions[::4]))["levels"]
    assert shares[-1] >= 0.9


def test_no_question_was_trained(questions):
    trained = {document.prompt.casefold() for document in documents(CorpusConfig())}
    assert not trained & {question.prompt.casefold() for question in questions}


def test_the_buckets_are_of_one_size_and_in_order(questions):
    members = [[q.count for q in questions if q.bucket == i] for i in range(5)]
    assert max(map(len, members)) - min(map(len, members)) <= 1
    assert all(min(more) >= max(less) for more, less in pairwise(members))


def test_a_prompt_longer_than_the_context_ends_in_one_line():
    done = run("generate", "--prompt", "hafnium " * 400)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "ends at 256" in done.stderr
