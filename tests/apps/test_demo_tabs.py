"""The tabs about training and the bank: live figures, and a verification in a thread of its own."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import gradio as gr
import pytest

from apps.demo import bank_tab, training_tab
from apps.demo.bank_tab import Progress, UseCounter, Verification
from apps.demo.folders import without_folders
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.training.curves import LOG, Curves
from tests.tiny import make_tiny_model

EVIL = "<script>alert('x')</script>"


def text_of(html: str) -> str:
    return " ".join("".join(ET.fromstring(f"<main>{html}</main>").itertext()).split())


# ---- training --------------------------------------------------------------------------


def log_of(folder: Path, first: int, last: int) -> None:
    with Curves(folder) as curves:
        for step in range(first, last + 1):
            curves.step({"step": step, "loss": 8 / step, "learning_rate": 1e-3})
        curves.validation(last, {"none": 3.25, "fetched": 2.5})


def test_the_curves_follow_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(training_tab, "_SHARE", 1e9)
    watch = training_tab.Watch(tmp_path)
    empty = watch.look()
    assert "No steps yet" in empty.html and not empty.picture
    log_of(tmp_path, 1, 4)
    first = watch.look()
    assert first.version > empty.version
    text = text_of(first.html)
    assert "Step4" in text and "Training loss2.0000" in text and "Learning rate0.001" in text
    assert "Validation, fetched2.5000 at step 4" in text
    log_of(tmp_path, 5, 8)
    second = watch.look()
    assert second.version > first.version and "Training loss1.0000" in text_of(second.html)
    assert second.picture != first.picture
    # What has not changed is neither read nor drawn again.
    monkeypatch.setattr(training_tab, "read_log", None)
    assert watch.look() is second


def test_the_picture_is_an_image_that_asks_nothing_of_the_network(tmp_path):
    log_of(tmp_path, 1, 40)
    picture = ET.fromstring(training_tab.Watch(tmp_path).look().picture)
    image = picture.find("img")
    kind, data = image.get("src").split(",")
    assert kind == "data:image/svg+xml;base64" and "loss" in image.get("alt")
    svg = ET.fromstring(base64.b64decode(data))
    assert svg.tag.endswith("svg")
    links = {value for one in svg.iter() for key, value in one.attrib.items() if "href" in key}
    assert all(link.startswith("#") for link in links)


def test_looking_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    log_of(tmp_path, 1, 4)
    now = [100.0]
    monkeypatch.setattr(training_tab.time, "monotonic", lambda: now[0])
    read = training_tab.read_log

    def slow(path):
        now[0] += 3  # seconds
        return read(path)

    monkeypatch.setattr(training_tab, "read_log", slow)
    watch = training_tab.Watch(tmp_path)
    first = watch.look()
    log_of(tmp_path, 5, 8)
    now[0] += 3 / training_tab._SHARE - 1
    assert watch.look() is first
    now[0] += 2
    assert watch.look().version == first.version + 1


def test_a_damaged_log_is_told_without_the_folder(tmp_path):
    (tmp_path / LOG).write_text(f"{json.dumps({'step': 1, 'loss': 2.0})}\n{EVIL}\n")
    view = training_tab.Watch(tmp_path).look()
    assert "line 2: not a line" in text_of(view.html) and 'role="alert"' in view.html
    assert str(tmp_path) not in view.html and not view.picture


def test_what_is_in_a_log_is_text_and_may_not_be_finite(tmp_path):
    with Curves(tmp_path) as curves:
        curves.step({"step": 1, "loss": float("nan"), "learning_rate": None})
        curves.validation(1, {EVIL: 2.0, "none": None})
    view = training_tab.Watch(tmp_path).look()
    text = text_of(view.html)
    assert "Training lossnot finite" in text and "Learning rate" not in text
    assert EVIL in text and "<script" not in view.html


def test_the_run_has_to_be_a_folder(tmp_path):
    assert training_tab.check_run(tmp_path) == tmp_path
    with pytest.raises(InputError, match="--run .*: no such folder"):
        training_tab.check_run(tmp_path / "none")


# ---- the bank --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    make_tiny_model(folder)
    return folder / "memory"


def finished(verification: Verification) -> Progress:
    verification._thread.join(60)
    return verification.progress


def test_a_verification_reads_every_byte_in_a_thread_of_its_own(memory):
    seen = []

    def opened():
        seen.append(threading.current_thread().name)
        return BlockReader(memory)

    verification = Verification(opened)
    assert "Not verified" in text_of(bank_tab.verified(verification.progress))
    assert verification.start()
    progress = finished(verification)
    size = sum(path.stat().st_size for path in memory.iterdir() if path.name != "manifest.json")
    assert progress == Progress("whole", size, size) and seen == ["verify"]
    assert "Whole" in text_of(bank_tab.verified(progress))
    assert verification.start()  # once more, when it is over
    finished(verification)


def test_one_verification_at_a_time_and_it_ends_with_the_server(memory):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(BlockReader):
        def __init__(self, folder):
            super().__init__(folder)
            begun.set()
            go_on.wait(60)

    verification = Verification(lambda: Slow(memory))
    assert verification.start() and begun.wait(60)
    assert not verification.start()
    assert 'data-phase="running"' in bank_tab.verified(verification.progress)
    verification._closing.set()
    go_on.set()
    verification.close()
    assert not verification._thread.is_alive()
    assert verification.progress.phase == "failed"
    assert not verification.start()


def test_damage_is_told_without_the_folders_of_the_machine(memory, tmp_path, capsys):
    broken = tmp_path / "secret place" / "memory"
    shutil.copytree(memory, broken)
    level = next(broken.glob("level-2-*"))
    data = bytearray(level.read_bytes())
    data[-3] ^= 1
    level.write_bytes(data)
    verification = Verification(lambda: BlockReader(broken))
    verification.start()
    progress = finished(verification)
    assert progress.phase == "damaged" and level.name in progress.text
    assert "secret" not in progress.text and 'role="alert"' in bank_tab.verified(progress)
    assert str(broken) in capsys.readouterr().err  # who runs the server sees where

    def gone():
        raise FormatError(f"{broken}: no such folder")

    verification = Verification(gone)
    verification.start()
    assert finished(verification).text == "the bank cannot be opened; see the server's log"

    def fault():
        raise ZeroDivisionError(str(broken))

    verification = Verification(fault)
    verification.start()
    progress = finished(verification)
    assert progress.phase == "failed" and progress.text.startswith("ZeroDivisionError (a fault")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/a b/c/x.bin: altered", "x.bin: altered"),
        ("x: is a link to /etc/a/passwd, outside", "x: is a link to passwd, outside"),
        ("/a b/c: gone", "the bank: gone"),
        ("3/4 of it", "3/4 of it"),
    ],
)
def test_folders_are_left_out(text, left):
    assert without_folders(text, ["/a b/c"]) == left


def test_what_a_bank_holds(memory):
    with MemoryBank.open(memory) as bank:
        report = bank.inspect()
    html = bank_tab.inspection(report)
    text = text_of(html)
    assert str(memory) not in html and report["revision"][:12] in text
    for row in report["levels"]:
        assert f"{row['level']}{row['clusters']:,}" in text and row["tier"] in text


def test_the_most_used_clusters_come_first_with_their_names():
    counter = UseCounter(MemoryConfig((1, 1), branching=4))
    names = ClusterNames([["a", EVIL, "c", "d"]])
    assert "No answer" in text_of(bank_tab.most_used(counter.uses(), names))

    def count():
        for _ in range(250):
            counter.add((1, 7))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    counter.add((0, 2))
    for thread in threads:
        thread.join()
    uses = counter.uses()
    assert uses.to_dict()["levels"] == {"1": {"0": 1, "1": 1000}, "2": {"2": 1, "7": 1000}}
    html = bank_tab.most_used(uses, names)
    assert "<script" not in html
    rows = [text_of(row) for row in re.findall("<tr>.*?</tr>", html) if 'scope="row"' in row]
    assert rows == [f"1{EVIL}1,000 (100%)", "0a1 (0%)", "7cluster 71,000 (100%)",
                    "2cluster 21 (0%)"]  # fmt: skip
    assert "–" in bank_tab.most_used(uses, None)
    for cluster in range(16):
        counter.add((cluster // 4, cluster))
    html = bank_tab.most_used(counter.uses(), None)
    assert html.count('scope="row"') == 4 + bank_tab.MOST


# ---- on the page -----------------------------------------------------------------------


def test_the_tabs_stand_on_a_page_and_pass_the_queue(memory, tmp_path):
    with MemoryBank.open(memory) as bank:
        report = bank.inspect()
    counter, verification = (
        UseCounter(MemoryConfig((1, 1), branching=4)),
        Verification(lambda: BlockReader(memory)),
    )
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Tab("Training"):
            training_tab.build(tmp_path)
        with gr.Tab("Bank"):
            bank_tab.build(report, verification, counter, None)
    assert len(page.fns) == 3
    for fn in page.fns.values():
        assert not fn.queue and fn.api_visibility == "private"
    tick, click, _ = (fn.fn for fn in page.fns.values())
    version, html, picture = tick(0)
    assert "No steps yet" in html
    assert not any(isinstance(one, str) for one in tick(version))  # all skipped
    click(("", ""))
    finished(verification)
    look = list(page.fns.values())[2].fn
    state, used, button, now = look(("", ""))
    assert "Whole" in state and button.interactive and isinstance(used, str)
    state, used, *_ = look(("", now[1]))
    assert "Whole" in state and not isinstance(used, str)  # skipped: it is what was shown
    assert not any(isinstance(one, str) for one in look(now)[:2])
