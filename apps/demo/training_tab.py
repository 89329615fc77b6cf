"""The tab with the learning curves of a run, live.

For who wires it into the page, inside ``gr.Blocks``:

    if run is not None:                      # --run FOLDER, of who starts the server
        with gr.Tab("Training"):
            training_tab.build(run)          # run: Path; nothing to close, nothing returned

``check_run(folder)`` raises InputError where the folder is no run; call it before the model loads.
Its timer runs past the queue, so it never waits for answers nor takes a place among them.

Notable: the log is read once for all visitors, when it has changed, and that takes a small share
of the time, however long it is.
"""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.training.curves import LOG, Log, read_log
from mlx_hiermem.training.picture import figure

#: Seconds between two looks at the log.
EVERY = 2.0

# Reading and drawing may take this share of the time.
_SHARE = 0.05


def check_run(folder: str | Path) -> Path:
    """The folder of a run; it may have no log yet.

    Raises:
        InputError: there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"--run {str(folder)!r}: no such folder; give the folder of a training")
    return path


@dataclass(frozen=True)
class View:
    """What the tab shows of a log.

    Attributes:
        version: another one for each change.
        html: the last figures, or what is wrong.
        picture: the curves; empty where there are none.
    """

    version: int
    html: str
    picture: str


class Watch:
    """Reads the log of a run when it has changed. For any thread.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        # Takes seconds, which are not to be counted as looking.
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401

        self.path = folder / LOG
        self._lock = threading.Lock()
        self._seen: Any = ()
        self._not_before = 0.0
        self._view = View(0, "", "")

    def look(self) -> View:
        """What the log holds now, or held shortly before where reading it takes long."""
        with self._lock:
            start = time.monotonic()
            mark = _mark(self.path)
            if mark == self._seen or start < self._not_before:
                return self._view
            self._seen = mark
            self._view = self._read(mark)
            now = time.monotonic()
            self._not_before = now + (now - start) / _SHARE
            return self._view

    def _read(self, mark: Any) -> View:
        version = self._view.version + 1
        if mark is None:
            return View(version, _note("No steps yet."), "")
        try:
            log = read_log(self.path)
        except FormatError as error:
            text = str(error).replace(f"{self.path.parent}/", "")
            return View(version, _note(text, "alert"), "")
        return View(version, summary(log), picture(log) if log.steps or log.validations else "")


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def picture(log: Log) -> str:
    """The curves of a log as an image, of lines and not of pixels; nothing is asked of the network.

    Returns:
        HTML. ``tree.css`` turns dark on light into light on dark where the page is dark.
    """
    data = io.BytesIO()
    drawn = figure(log.steps, log.validations)
    # Without the date, the same log gives the same picture.
    drawn.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text = base64.b64encode(data.getvalue()).decode()
    return (
        '<figure class="hm-card hm-curves"><img alt="Learning curves: training loss, learning '
        f'rate and validation losses by step" src="data:image/svg+xml;base64,{text}"/></figure>'
    )


def summary(log: Log) -> str:
    """The last figures of a log as HTML."""
    if not log.steps and not log.validations:
        return _note("No steps yet.")
    pairs: list[tuple[str, str]] = []
    if log.steps:
        last = log.steps[-1]
        pairs.append(("Step", f"{last['step']:,}"))
        pairs.append(("Training loss", _loss(last.get("loss"))))
        if _finite(last.get("learning_rate")):
            pairs.append(("Learning rate", f"{last['learning_rate']:.3g}"))
    if log.validations:
        entry = log.validations[-1]
        pairs += [
            (f"Validation, {name}", f"{_loss(loss)} at step {entry['step']:,}")
            for name, loss in entry["validation"].items()
        ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs
    )
    return (
        '<section class="hm-card" aria-label="Training"><dl class="hm-meters hm-first">'
        f"{items}</dl></section>"
    )


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _loss(value: Any) -> str:
    return f"{value:.4f}" if _finite(value) else "not finite"


def _note(text: str, role: str = "status") -> str:
    return (
        f'<section class="hm-card" aria-label="Training"><p class="hm-quiet" role="{role}">'
        f"{escape(text)}</p></section>"
    )


def build(folder: Path) -> None:
    """Put the tab's content where it is called, in ``gr.Blocks``.

    Args:
        folder: of the run.
    """
    import gradio as gr

    watch = Watch(folder)
    seen = gr.State(0)
    figures = gr.HTML(_note("Reading the log."), elem_id="training-figures")
    curves = gr.HTML("", elem_id="training-curves")

    def look(version: int) -> tuple[Any, Any, Any]:
        view = watch.look()
        if view.version == version:
            return gr.skip(), gr.skip(), gr.skip()
        return view.version, view.html, view.picture

    gr.Timer(EVERY).tick(
        look, seen, [seen, figures, curves], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
