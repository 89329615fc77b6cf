"""The benchmark of added memories runs, and its facts are what it says they are."""

from __future__ import annotations

import json

from benchmarks.harness import main
from benchmarks.studies import add_knowledge, private_facts


def test_the_facts_are_asked_in_a_wording_that_no_document_has(tmp_path):
    facts = private_facts.make(10, 3)
    assert facts == private_facts.make(10, 3) != private_facts.make(10, 4)
    assert len(facts.questions) == 30 and len(facts.documents) == 120
    texts = {document["text"] for document in facts.documents}
    for question in facts.questions:
        assert question.continuation == f" {question.answer}."
        assert not any(question.prompt in text for text in texts)
        assert sum(question.answer in text for text in texts) >= 4
    for document in facts.documents:
        assert document["text"].startswith(document["prompt"] + " ")
    lines = facts.write(tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == facts.documents


def test_a_smoke_run_has_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(add_knowledge, "SMOKE_THINGS", 2)
    arguments = ["--smoke", "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]
    assert main(add_knowledge.NAME, add_knowledge.measure, arguments, add_knowledge.options) == 0
    rows = {
        row["id"]: row["value"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]
    }
    ways = ["memory", "lora-fetch-0.003", "lora-bank-0.003"]
    expected = {f"add.{which}@{way}" for which in ("new", "old") for way in ways}
    expected |= {f"add.{name}" for name in ("lands", "diverted", "old@before")}
    expected |= {f"add.{name}@greedy" for name in ("lands", "diverted")}
    assert set(rows) == expected
    assert all(0 <= value <= 1 for value in rows.values())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
