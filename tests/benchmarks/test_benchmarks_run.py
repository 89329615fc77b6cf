"""All benchmarks in one command: what is run, what is reported, compared, and put into the docs."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from benchmarks import catalogue, claims
from benchmarks.__main__ import main
from benchmarks.compare import changes
from benchmarks.run import read_results

PNG = b"\x89PNG made up"


def write(folder, name, values, smoke=False, text="", commit="abc"):
    """What a script leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = dict.fromkeys(("processor", "cores", "backend", "mlx", "python", "system"), "some")
    rows = [
        {"id": id, "value": value, "goal": "", "detail": "7.5 ms"} for id, value in values.items()
    ]
    known = {"benchmark": name, "machine": machine, "commit": commit, "smoke": smoke, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(known))
    (folder / f"{name}.txt").write_text(f"{text}\nid   value\n...\n")
    (folder / f"{name}.png").write_bytes(PNG)


LEVELS = {f"levels.facts@level-{i}": i / 10 for i in range(1, 5)} | {"levels.facts@all": 0.2}


# ---- the catalogue ---------------------------------------------------------------------


def test_everything_in_the_catalogue_is_there_and_has_one_name():
    names = [entry.short for entry in catalogue.ALL]
    assert len(set(names)) == len(names)
    for entry in catalogue.ALL:
        assert find_spec(f"benchmarks.{entry.name}") is not None, entry.name
        assert entry.title and (not entry.says or entry.paper)
    assert set(claims.CLAIMS) <= set(names)


def test_it_is_listed(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(catalogue.ALL)
    assert any("levels" in line and "(figure 3b)" in line for line in shown)


# ---- run -------------------------------------------------------------------------------


def test_a_real_run_and_what_is_there_already(tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["run", "ffn_forms", "--smoke", "--out", str(out)]) == 0
    result = json.loads((out / "ffn_forms.json").read_text())
    assert result["smoke"] and result["rows"]
    report = (out / "report.md").read_text()
    assert "A smoke run: the values say nothing" in report and "benchmarks.ffn_forms" in report
    everything = json.loads((out / "report.json").read_text())
    assert everything["benchmarks"]["ffn_forms"] == result and everything["commit"]
    before = (out / "ffn_forms.json").stat().st_mtime_ns
    capfd.readouterr()
    assert main(["run", "ffn_forms", "--smoke", "--out", str(out)]) == 0
    assert "there already" in capfd.readouterr().out
    assert (out / "ffn_forms.json").stat().st_mtime_ns == before


def test_a_script_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(catalogue, "ALL", (catalogue.Entry("none", "No such script"),))
    from benchmarks import run

    monkeypatch.setattr(run, "find", lambda name: catalogue.ALL[0])
    write(tmp_path, "levels", LEVELS)
    assert main(["run", "none", "--out", str(tmp_path)]) == 1
    shown = capfd.readouterr().out
    assert "failed: none" in shown and "exit code 1" in shown
    assert "levels" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "--out", "{}"], "nothing: no such benchmark; expected one of fetch"),
        (["run", "levels", "--out", "{}/file/x"], "cannot be written"),
        (["compare", "{}/none", "{}"], "holds no results; make them with"),
        (["results", "{}/none"], "holds no results; make them with"),
        (["compare", "{}/bad", "{}/bad"], "levels.json: not what a benchmark writes"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "levels.json").write_text('{"rows": [{"id": 1}]}')
    assert main([one.format(tmp_path) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# ---- compare ---------------------------------------------------------------------------


def test_two_runs_are_compared(tmp_path, capsys):
    write(tmp_path / "a", "levels", {"x": 2.0, "gone": 1.0, "zero": 0.0})
    write(tmp_path / "b", "levels", {"new": 4.0, "x": 3.0, "zero": 1.0})
    found = {one.id: (one.before, one.after, one.ratio) for one in changes(*_two(tmp_path))}
    assert found == {
        "new": (None, 4.0, None), "x": (2.0, 3.0, 1.5), "zero": (0.0, 1.0, None),
        "gone": (1.0, None, None),
    }  # fmt: skip
    assert list(found) == ["new", "x", "zero", "gone"]
    file = tmp_path / "rows.json"
    assert main(["compare", *map(str, _two(tmp_path)), "--json", str(file)]) == 0
    assert "1.500" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"][1]["ratio"] == 1.5


def _two(folder):
    return folder / "a", folder / "b"


# ---- results ---------------------------------------------------------------------------


def test_results_stand_beside_the_paper(tmp_path):
    write(tmp_path / "run", "levels", LEVELS, text="level  facts %\n1  10.0")
    write(tmp_path / "run", "sizes", {"sizes.facts@1": 0.2, "sizes.facts@2": 0.1})
    write(tmp_path / "run", "fetch", {"fetch.warm_vs_pread": 1.0, "fetch.paths_per_second": 7.0})
    write(tmp_path / "run", "decode", {"decode.memory_vs_anchor": 0.9})
    docs = tmp_path / "docs"
    assert main(["results", str(tmp_path / "run"), "--docs", str(docs)]) == 0
    page = (docs / "results.md").read_text()
    assert "| [figure 3b](#levels-of-the-tree) | at one fetch size, the deeper the level" in page
    assert "the deeper the level the better: **agrees**" in page
    assert "a bigger fetch is better: **does not agree**" in page
    assert "level  facts %\n1  10.0" in page and "## Levels of the tree" in page
    assert "![Levels of the tree](images/results/levels.png)" in page
    assert (docs / "images" / "results" / "levels.png").read_bytes() == PNG
    assert page.index("## Fetching") < page.index("## Levels") < page.index("## Sizes")
    assert "Decoding" not in page  # of which the paper says nothing
    assert "fetch.warm_vs_pread  1.000" in page
    assert "7.5 ms" not in page and "_per_second" not in page
    assert "fetch.png" not in page
    assert read_results(tmp_path / "run")["levels"]["commit"] in page


def test_a_later_run_renews_its_own_sections(tmp_path):
    first, second, docs = tmp_path / "first", tmp_path / "second", tmp_path / "docs"
    write(first, "levels", LEVELS, text="level  facts %")
    write(first, "sizes", {"sizes.facts@1": 0.2, "sizes.facts@2": 0.1}, text="size  facts %")
    write(second, "sizes", {"sizes.facts@1": 0.1, "sizes.facts@2": 0.2}, text="new", commit="def")
    write(second, "shapes", {"shapes.facts@4-1": 0.2}, text="## shape  facts %", commit="def")
    assert main(["results", str(first), "--docs", str(docs)]) == 0
    before = (docs / "results.md").read_text()
    assert main(["results", str(second), "--docs", str(docs)]) == 0
    page = (docs / "results.md").read_text()
    levels = before[before.index("## Levels") : before.index("## Sizes")]
    assert levels in page and "level  facts %" in levels
    assert "a bigger fetch is better: **agrees**" in page and "size  facts %" not in page
    assert page.count("| at one fetch size, the deeper") == page.count("| a bigger fetch is") == 1
    assert page.index("## Levels") < page.index("## Sizes") < page.index("## Other trees")
    assert "commit abc, def." in page
    assert main(["results", str(first), "--docs", str(docs)]) == 0
    assert main(["results", str(second), "--docs", str(docs)]) == 0
    assert (docs / "results.md").read_text() == page


def test_a_smoke_run_does_not_get_into_the_docs(tmp_path, capsys):
    write(tmp_path / "run", "levels", LEVELS, smoke=True)
    docs = tmp_path / "docs"
    assert main(["results", str(tmp_path / "run"), "--docs", str(docs)]) == 2
    assert "levels is of a smoke run" in capsys.readouterr().err and not docs.exists()


FREQUENCY = {
    f"frequency.facts@{bucket}-{what}": share
    for bucket, (generic, fetched) in enumerate(((0.9, 0.95), (0.5, 0.8), (0.1, 0.7)))
    for what, share in (("generic", generic), ("fetched", fetched))
} | {
    f"frequency.atomic@{bucket}-{what}": share
    for bucket in (0, 1)
    for what, share in (("generic", 0.1), ("fetched", 0.2))
}
RAG = {
    "rag.accuracy@memory": 0.9, "rag.accuracy@bare+rag1": 0.5, "rag.accuracy@bare+rag3": 0.2,
    "rag.flops@memory": 1.1, "rag.flops@bare+rag1": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("study", "values", "expected"),
    [
        ("levels", LEVELS, [True]),
        ("levels", LEVELS | {"levels.facts@level-2": 0.9}, [False]),
        ("levels", {}, [None]),
        ("sizes", {"sizes.facts@1": 0.1, "sizes.facts@2": 0.2}, [True]),
        ("shares", {"shares.facts@2%": 0.1, "shares.facts@9%": 0.3}, [True]),
        ("shares", {"shares.facts@2%": 0.4, "shares.facts@9%": 0.3}, [False]),
        ("learning", {"learning.facts@co-trained": 0.4, "learning.facts@frozen": 0.5}, [False]),
        ("placement", {f"placement.facts@{n}": v for n, v in
                       (("late", 0.9), ("early", 0.1), ("middle", 0.2), ("uniform", 0.8))},
         [True, True]),
        ("placement", {f"placement.facts@{n}": v for n, v in
                       (("late", 0.1), ("early", 0.9), ("middle", 0.2), ("uniform", 0.8))},
         [False, False]),
        ("bank_sizes", {f"bank_sizes.facts@{r}-{n}": r * n for r in (8, 16) for n in (1, 2)},
         [True, True]),
        ("bank_sizes", {f"bank_sizes.facts@{r}-{n}": r / n for r in (8, 16) for n in (1, 2)},
         [True, False]),
        ("kinds", {f"kinds.facts@{k}-15360": v for k, v in
                   (("ffn", 0.8), ("lora_ffn", 0.9), ("lora_qk", 0.3), ("lora_vo", 0.4),
                    ("kv", 0.2))},
         [False, True]),
        ("regimes", {f"regimes.SK@{k}": v for k, v in
                     (("A1-none", 0.1), ("A2-co-trained", 0.5), ("A3-frozen", 0.4),
                      ("A4-from-scratch", 0.05))}, [True, False]),
        ("frequency", FREQUENCY, [True, True]),
        ("frequency", FREQUENCY | {"frequency.facts@2-generic": 0.7}, [False, True]),
        ("frequency", FREQUENCY | {"frequency.atomic@1-generic": 0.3}, [True, False]),
        ("blocking", {f"blocking.accuracy@{k}": v for k, v in
                      (("nearest-0", 0.7), ("nearest-1", 0.2), ("none", 0.15))}, [True]),
        ("blocking", {f"blocking.accuracy@{k}": v for k, v in
                      (("nearest-0", 0.7), ("nearest-1", 0.5), ("none", 0.15))}, [False]),
        ("train_step", {"train.frozen_vs_anchor": 1.2, "train.cotrain_vs_anchor": 1.6}, [True]),
        ("train_step", {"train.frozen_vs_anchor": 1.2, "train.cotrain_vs_anchor": 1.8}, [False]),
        ("rag", RAG, [True, True, True]),
        ("rag", RAG | {"rag.accuracy@bare+rag3": 0.95}, [False, True, True]),
        ("rag", RAG | {"rag.flops@memory": 1.3, "rag.flops@bare+rag1": 2.5}, [True, False, False]),
    ],
)  # fmt: skip
def test_claims_hold_or_not(study, values, expected):
    assert [holds for _, holds in claims.verdicts(study, values)] == expected
