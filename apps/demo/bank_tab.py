"""The tab about the bank: what it holds, whether it is whole, which clusters are used most.

For who wires it into the page:

    counter = bank_tab.UseCounter(config)   # one for the server, before page()
    counter.add(path.ids)                              # once per answer, any thread
    verification = bank_tab.Verification(lambda: BlockReader(folder))  # one for the server
    with gr.Tab("Bank"):
        bank_tab.build(report, verification, counter, names)
    verification.close()                               # when the server ends

- ``report``: what ``lm.bank.inspect()`` gave in the model's thread at the start (plain values).
- ``BlockReader`` is of ``mlx_hiermem.bank.reader``; NumPy alone, so it is opened, read and closed
  in the verification's own thread, never in the model's. Give it the same ``folders`` and ``part``
  as the bank was opened with, where there are any.
- ``names``: ``ClusterNames`` or None.

Notable: one verification at a time for the whole server, whoever asked; no folder of the machine is
shown to a visitor; of what visitors ask only the number of answers per cluster is kept.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_hiermem.commands.bank.uses import Uses
from mlx_hiermem.errors import HierMemError

from .folders import without_folders
from .view import size

if TYPE_CHECKING:
    from mlx_hiermem.bank.reader import BlockReader
    from mlx_hiermem.config import MemoryConfig
    from mlx_hiermem.routing.names import ClusterNames

#: Seconds between two looks at the counts and the verification.
EVERY = 2.0

#: Clusters of each level that are shown as the most used.
MOST = 8


class UseCounter:
    """How often each cluster was on a path, since the server started. For any thread.

    Args:
        config: of the bank.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._leaves: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, path: Sequence[int]) -> None:
        """Count one answer with this path, one cluster for each level."""
        with self._lock:
            self._leaves[int(path[-1])] += 1

    def uses(self) -> Uses:
        """The counts so far."""
        with self._lock:
            found = sorted(self._leaves.items())
        leaves, counts = np.array(found, np.int64).reshape(-1, 2).T
        k, levels, added = self._config.branching, self._config.levels, self._config.roots
        return Uses(k, levels, leaves, counts, "answers", "this server", added - k)


@dataclass(frozen=True)
class Progress:
    """How far a verification is.

    Attributes:
        phase: "never", "running", "whole", "damaged" or "failed".
        done, total: bytes.
        text: for "damaged" and "failed" what is wrong, in one line.
    """

    phase: str = "never"
    done: int = 0
    total: int = 0
    text: str = ""


class _Closed(Exception):
    pass


class Verification:
    """Verifies the bank in a thread of its own, once at a time. For any thread.

    Args:
        open_reader: opens the bank; called in that thread, which closes it.
    """

    def __init__(self, open_reader: Callable[[], BlockReader]) -> None:
        self._open = open_reader
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._progress = Progress()

    @property
    def progress(self) -> Progress:
        """How far the last one is, or what came of it."""
        return self._progress

    def start(self) -> bool:
        """Begin, unless one is running; returns whether it was begun."""
        with self._lock:
            if self._progress.phase == "running" or self._closing.is_set():
                return False
            self._progress = Progress("running")
            # A daemon: an interpreter that has to go does not wait for terabytes to be read.
            self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
            self._thread.start()
            return True

    def close(self, timeout: float = 10.0) -> None:
        """End the one that runs; waits ``timeout`` seconds at most."""
        self._closing.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        done = total = 0
        places: list[str] = []
        try:
            from mlx_hiermem.bank.verify import verify_bank

            reader = self._open()
            try:
                places = [str(reader.folder)]
                places += [str(reader.place(level)) for level in reader.config.memory_levels]
                total = sum(reader.manifest.files[name].bytes for name in reader.listed)

                def read(count: int) -> None:
                    nonlocal done
                    done += count
                    self._progress = Progress("running", done, total)
                    if self._closing.is_set():
                        raise _Closed

                verify_bank(reader, read)
                self._progress = Progress("whole", done, total)
            finally:
                reader.close()
        except _Closed:
            self._progress = Progress("failed", done, total, "ended with the server")
        except HierMemError as error:
            print(f"verify: {error}", file=sys.stderr, flush=True)
            text = without_folders(str(error), places)
            if not places:  # it could not even be opened
                text = "the bank cannot be opened; see the server's log"
            self._progress = Progress("damaged", done, total, text)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__} (a fault of ours; see the server's log)"
            self._progress = Progress("failed", done, total, text)


# ---- HTML ------------------------------------------------------------------------------


def inspection(report: Mapping[str, Any]) -> str:
    """What a bank holds, level by level.

    Args:
        report: of ``MemoryBank.inspect``.
    """
    packing = report["quantization"]
    numbers = report["levels"][0]["dtype"] if packing is None else f"{packing['bits']}-bit"
    facts = (
        ("Kind", str(report["kind"])),
        ("Numbers", f"{report['bank_size']:,}, {numbers}"),
        ("Whole bank", size(report["bank_bytes"])),
        ("One fetched memory", size(report["fetch_bytes"])),
        ("Revision", report["revision"][:12]),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    rows = "".join(
        f'<tr><th scope="row">{row["level"]}</th><td>{row["clusters"]:,}</td>'
        f"<td>{size(row['block_bytes'])}</td><td>{size(row['total_bytes'])}</td>"
        f"<td>{escape(row['tier'])}</td><td>{row['blocked']:,}</td></tr>"
        for row in report["levels"]
    )
    columns = ("Level", "Clusters", "Block", "All blocks", "Held", "Blocked")
    heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        '<section class="hm-card" aria-label="The bank"><dl class="hm-meters hm-first">'
        f'{items}</dl><div class="hm-scroll"><table class="hm-table">'
        "<caption>Levels of the bank</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def verified(progress: Progress) -> str:
    """How far a verification is."""
    share = progress.done / progress.total if progress.total else 0.0
    bar, role = "", "status"
    if progress.phase == "never":
        text = "Not verified since the server started."
    elif progress.phase == "running":
        text = f"Verifying: {size(progress.done)} of {size(progress.total)} read."
        bar = (
            f'<span class="hm-bar" role="progressbar" aria-label="Verified" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{100 * share:.0f}">'
            f'<span style="width:{share:.1%}"></span></span>'
        )
    elif progress.phase == "whole":
        text = f"Whole: all {size(progress.done)} are as the manifest says."
    else:
        what = "Not whole" if progress.phase == "damaged" else "Not finished"
        text, role = f"{what}: {progress.text}", "alert"
    mark = "hm-error" if role == "alert" else "hm-quiet"
    return (
        f'<section class="hm-card hm-verified" data-phase="{progress.phase}" '
        f'aria-label="Verification"><p class="{mark}" role="{role}">{escape(text)}</p>{bar}'
        "</section>"
    )


def most_used(uses: Uses, names: ClusterNames | None) -> str:
    """The most used clusters of each level, with their names."""
    if not uses.total:
        return (
            '<section class="hm-card" aria-label="Most used clusters"><p class="hm-quiet">'
            "No answer has used a cluster yet.</p></section>"
        )
    tables = "".join(_level(uses, level, names) for level in range(1, uses.levels + 1))
    return f'<section class="hm-card" aria-label="Most used clusters">{tables}</section>'


def _level(uses: Uses, level: int, names: ClusterNames | None) -> str:
    clusters, counts = uses.at(level)
    order = np.lexsort((clusters, -counts))[:MOST]
    rows = "".join(
        f'<tr><th scope="row">{cluster}</th>'
        f"<td>{escape('–' if names is None else names.of(level, cluster))}</td>"
        f'<td>{count:,} ({count / uses.total:.0%})<span class="hm-bar" aria-hidden="true">'
        f'<span style="width:{count / uses.total:.1%}"></span></span></td></tr>'
        for cluster, count in zip(clusters[order].tolist(), counts[order].tolist(), strict=True)
    )
    return (
        '<div class="hm-scroll"><table class="hm-table hm-used"><caption>Level '
        f"{level}: {len(clusters):,} of {uses.clusters(level):,} clusters used by {uses.total:,} "
        f'{escape(uses.what)}</caption><thead><tr><th scope="col">Cluster</th>'
        '<th scope="col">Name</th><th scope="col">Uses</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def build(
    report: Mapping[str, Any],
    verification: Verification,
    counter: UseCounter,
    names: ClusterNames | None,
) -> None:
    """Put the tab's content where it is called, in ``gr.Blocks``; see the head of this file."""
    import gradio as gr

    gr.HTML(inspection(report), elem_id="bank-inspect")
    button = gr.Button("Verify every byte", elem_id="bank-verify")
    state = gr.HTML(verified(Progress()), elem_id="bank-verified")
    used = gr.HTML(most_used(counter.uses(), names), elem_id="bank-used")
    seen = gr.State(("", ""))

    def look(before: tuple[str, str]) -> tuple[Any, Any, Any, Any]:
        progress = verification.progress
        now = (verified(progress), most_used(counter.uses(), names))
        # What has not changed is left alone, so that nobody loses their place in it.
        parts = [new if new != old else gr.skip() for new, old in zip(now, before, strict=True)]
        return *parts, gr.Button(interactive=progress.phase != "running"), now

    def start(before: tuple[str, str]) -> tuple[Any, Any, Any, Any]:
        verification.start()
        return look(before)

    # Past the queue, so that neither waits for answers nor takes a place among them.
    options: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    outputs = [state, used, button, seen]
    button.click(start, seen, outputs, **options)
    gr.Timer(EVERY).tick(look, seen, outputs, **options)
