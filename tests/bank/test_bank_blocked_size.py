"""blocked.json is written no larger than it is read: an edit may not make a bank unreadable."""

from __future__ import annotations

import json

import pytest

from mlx_hiermem.bank import edit as edit_module
from mlx_hiermem.bank.blocked import MOST_BYTES, show_blocks
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.remove import remove
from mlx_hiermem.errors import FormatError
from tests.corpus.corpora import files_of

#: blocked.json with the blocks 2:0 to 2:3, and nothing removed.
FOUR = len('{"blocked": [[2, 0], [2, 1], [2, 2], [2, 3]]}\n')


def test_a_reader_takes_what_an_edit_may_write_and_no_byte_more(bank):
    path = bank.folder / "blocked.json"
    text = json.dumps({"blocked": [[2, 1]]})
    path.write_text(text.ljust(MOST_BYTES))
    write_manifest(bank.folder)
    reader = BlockReader(bank.folder)
    assert reader.blocked == {(2, 1)}
    reader.close()
    path.write_text(text.ljust(MOST_BYTES + 1))
    write_manifest(bank.folder)
    with pytest.raises(FormatError, match=f"expected at most {MOST_BYTES}"):
        BlockReader(bank.folder)


@pytest.mark.parametrize("removing", [False, True])
def test_a_list_that_no_reader_takes_is_refused(bank, monkeypatch, removing):
    blocks = [(2, cluster) for cluster in range(4)]

    def change(count: int, steps: list[str]) -> None:
        if removing:
            remove(bank.folder, blocks[:count], step=steps.append)
        else:
            with BankEdit(bank.folder, step=steps.append) as edit:
                edit.set_blocked(blocks[:count])

    limit = FOUR + len(', "removed": []') * removing
    monkeypatch.setattr(edit_module, "MOST_BYTES", limit - 1)
    before, steps = files_of(bank.folder), []
    with pytest.raises(FormatError) as error:
        change(4, steps)
    line = str(error.value)
    assert line.startswith(f"{bank.folder / 'blocked.json'}: would have {limit} bytes for 4 blocks")
    assert f"expected at most {limit - 1}; name fewer" in line and "\n" not in line
    assert files_of(bank.folder) == before and steps == []  # not even a temporary file
    change(3, steps)
    monkeypatch.setattr(edit_module, "MOST_BYTES", limit)
    change(4, steps)
    reader = BlockReader(bank.folder)
    assert (reader.blocked.removed if removing else reader.blocked) == set(blocks)
    reader.close()


def test_blocks_in_a_line():
    assert show_blocks({(2, 40), (1, 3)}) == "1:3, 2:40"
    assert show_blocks((2, i) for i in range(2000)) == "2:0, 2:1, 2:2 and 1,997 more"
