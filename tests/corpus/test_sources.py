"""Sources: however a file is cut into units, its documents come once and in order."""

from __future__ import annotations

import gzip
import json
import re
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.corpus import sources
from mlx_hiermem.corpus.sources import document as document_module
from mlx_hiermem.corpus.sources import find_dataset_units, find_files, find_units, read_unit
from mlx_hiermem.errors import ConfigError, InputError


def texts_of(units, field: str = "text") -> list[str]:
    return [document.text for unit in units for document in read_unit(unit, field)]


# ---- ranges ----------------------------------------------------------------------------

#: What lines are made of: blank ones, other white space, characters of several bytes.
lines = st.lists(
    st.sampled_from(
        ["", " ", "\t \r", "\u2028", "\u00a0", "a", " b ", "é\u2028é", "word word", "𝄞x"]
    ),
    max_size=24,
)


@given(lines, st.integers(1, 40), st.booleans())
def test_ranges_of_a_text_hold_the_same_documents_as_the_whole(tmp_path_factory, lines, size, end):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    text = "\n".join(lines) + "\n" * end
    path.write_bytes(text.encode())
    if not text:
        return
    expected = [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    assert texts_of(find_units([path], sys.maxsize)) == expected
    units = find_units([path], size)
    assert texts_of(units) == expected
    assert (
        [(u.begin, u.end) for u in units][-1][1] == sum(u.size for u in units) == len(text.encode())
    )


@given(st.lists(st.text(max_size=9), min_size=1, max_size=12), st.integers(1, 60), st.booleans())
def test_ranges_of_jsonl_hold_each_line_once(tmp_path_factory, texts, size, end):
    path = tmp_path_factory.mktemp("jsonl") / "some.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\n".join(rows) + "\n" * end).encode("utf-8"))
    assert texts_of(find_units([path], size)) == texts


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "four"}'))
    assert texts_of(find_units(find_files([str(tmp_path)]), 4)) == ["one", "two", "three", "four"]


def test_progress_within_a_unit_goes_up_to_its_end(tmp_path):
    rows = "".join(json.dumps({"text": f"{i} " * i}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "c.txt").write_text(rows.replace("\n", "\n\n"))
    for unit in find_units(find_files([str(tmp_path)]), 1 << 20):
        done = [document.done for document in read_unit(unit, "text")]
        assert len(done) == 40 and done == sorted(done)
        assert 0 <= done[0] and done[-1] == pytest.approx(1, abs=1e-3)


# ---- fields ----------------------------------------------------------------------------


def test_fields_are_texts_or_lists_of_texts_and_may_be_absent(tmp_path):
    rows = [
        {"body": "one", "title": "T", "questions": ["a?", "b?"]},
        {"body": None, "title": None},
        {"body": "half \ud83d of a pair", "questions": []},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (unit,) = find_units([path], sys.maxsize)
    found = list(read_unit(unit, "body", ["title", "questions"]))
    assert [document.text for document in found] == ["one", "", "half \ufffd of a pair"]
    assert [document.fields for document in found] == [
        {"title": ["T"], "questions": ["a?", "b?"]}, {}, {"questions": []},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"text": "x"', "not valid JSON"),
        ('{"txt": "x"}', 'expected an object with a "text"; name another field'),
        ("[]", 'expected an object with a "text"'),
        ('{"text": 5}', "that is a text, found int"),
        ('{"text": "x", "q": 5}', 'field "q" is neither a text nor a list of texts'),
        ('{"text": "x", "q": ["a", 5]}', 'field "q" is neither'),
        ("[" * 100_000, "not valid JSON"),
        ("\0", "not UTF-8 text"),
        ("\udcff", "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_line_that_is_no_document_is_named_with_its_true_number(tmp_path, line, says, kind):
    rows = [json.dumps({"text": "word " * (i % 5)}) for i in range(30)]
    rows[17] = line
    data = "\n".join(["", *rows]).encode("utf-8", "surrogateescape")  # the first line is empty
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    with pytest.raises(InputError, match=says) as error:
        for unit in find_units([path], 100):  # line 19 is in the middle of some later unit
            list(read_unit(unit, "text", ["q"]))
    assert f"{path}: line 19: " in str(error.value)


def test_a_binary_text_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\n" + bytes(range(128, 256)))
    with pytest.raises(InputError, match="a.txt: line 4: not UTF-8 text"):
        texts_of(find_units([path], 5))


@pytest.mark.parametrize("name, filler", [("a.jsonl", b"x"), ("a.txt", b"x"), ("a.txt", b"x\n")])
def test_a_document_without_end_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch, name, filler
):
    path = tmp_path / name
    path.write_bytes(filler * 5000)
    monkeypatch.setattr("mlx_hiermem.corpus.sources.lines.MAX_DOCUMENT", 1000)
    with pytest.raises(InputError, match=f"{name}: line 1: longer than"):
        texts_of(find_units([path], 100))
    assert document_module.MAX_DOCUMENT >= 64 << 20


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i**7) for i in range(3000)))
    path = tmp_path / "a.jsonl.gz"
    for damaged in (data[: len(data) // 2], b"plain", data[:40] + b"\0" * 40 + data[80:]):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"a.jsonl.gz: line \d+: (damaged gzip|not UTF-8|not v)"
        ):
            texts_of(find_units([path], 100))


# ---- Parquet and datasets --------------------------------------------------------------


def test_parquet_is_read_by_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(1000)]
    questions = [[f"{i}?"] for i in range(1000)]
    table = pa.table({"text": [None, *texts[1:]], "other": range(1000), "questions": questions})
    pq.write_table(table, path, row_group_size=300)
    units = find_units([path], 1)
    assert [(unit.begin, unit.end) for unit in units] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert texts_of(units) == ["", *texts[1:]]
    document = list(read_unit(units[2], "text", ["questions", "nothing"]))[1]
    assert document.where() == f"{path}: row 602" and document.text == "text 601"
    assert document.fields == {"questions": ["601?"]}
    with pytest.raises(InputError, match='no column "body"; columns are text, other, questions'):
        texts_of(units, "body")
    with pytest.raises(InputError, match="row 1: .* that is a text, found int"):
        texts_of(units, "other")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path, compression="none")
    data = path.read_bytes()
    path.write_bytes(data[:100])
    with pytest.raises(InputError, match="a.parquet: not a readable Parquet file"):
        find_units([path], 1)
    path.write_bytes(b"\xff" * 60 + data[60:])
    with pytest.raises(InputError, match="a.parquet: not a readable Parquet file"):
        texts_of(find_units([path], 1))


def test_a_dataset_is_read_by_shards(tmp_path):
    for number in range(3):
        rows = [{"body": f"{number} {i}", "q": [str(i)]} for i in range(4)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    units = find_dataset_units(str(tmp_path), {"split": "train"})
    assert [(unit.begin, unit.end) for unit in units] == [(0, 3), (1, 3), (2, 3)]
    assert sorted(texts_of(units, "body")) == sorted(
        f"{number} {i}" for number in range(3) for i in range(4)
    )
    assert next(iter(read_unit(units[1], "body", ["q"]))).fields == {"q": ["0"]}
    with pytest.raises(InputError, match='shard 0 of 3: row 1: expected an object with a "text"'):
        texts_of(units)
    with pytest.raises(InputError, match="cannot be read"):
        find_dataset_units(str(tmp_path), {"split": "nothing"})


def test_a_dataset_never_runs_code(tmp_path):
    (tmp_path / "set.py").write_text("raise SystemExit('code of a dataset was run')")
    with pytest.raises(InputError, match="cannot be read"):
        find_dataset_units(str(tmp_path / "set.py"), {})
    assert datasets.__version__


@pytest.mark.parametrize("library, extra", [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, library, extra):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"]}), path)
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'mlx-hiermem\[{extra}\]'"):
        find_units([path], 1) if extra == "parquet" else find_dataset_units("some/set", {})


# ---- names -----------------------------------------------------------------------------


def test_files_come_once_and_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "sub/d.JSONL.gz", ".hidden/e.txt", "f.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "**" / "*.parquet")])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["b.txt", "a.jsonl", "sub/c.parquet", "sub/d.JSONL.gz"]
    assert set(sources.KINDS.values()) == {"jsonl.gz", "jsonl", "txt", "parquet"}


@pytest.mark.parametrize(
    "name, says",
    [
        ("nothing.txt", "no such file, folder or pattern"),
        ("*.txt", "no such file, folder or pattern"),
        ("empty", "the folder is empty; expected documents in .txt"),
        ("a.md", "the name ends in '.md'; files that can be read are .txt"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(InputError, match=re.escape(says)):
        find_files([str(tmp_path / name)])


def test_a_link_to_a_file_without_an_ending_is_read_by_its_own_name(tmp_path):
    """The Hub's cache keeps files under their sums, and links to them under their names."""
    blob = tmp_path / "blobs" / "0f3a"
    blob.parent.mkdir()
    blob.write_text("one\n\ntwo")
    link = tmp_path / "data" / "a.txt"
    link.parent.mkdir()
    link.symlink_to(blob)
    for name in (link, link.parent):
        assert find_files([str(name)]) == [link]
    assert texts_of(find_units(find_files([str(link)]), 4)) == ["one", "two"]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match="a.txt: the file is empty"):
        find_units([tmp_path / "a.txt"], 1)
