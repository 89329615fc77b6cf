"""The Gradio page, and the server that runs it.

Notable:
- Handlers talk to the model's thread through tickets and never touch MLX.
- Nothing comes from outside: no analytics, system fonts, no share link, no footer links. The page
  itself asks only the address that it came from.
- What a visitor has hangs on their session and is dropped when they leave: Gradio closes the
  generator, whose ``finally`` withdraws the ticket, and calls ``Desk.leave``.
"""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_hiermem.errors import InputError

from . import (
    ask_tab,
    bank_tab,
    compare_tab,
    controls,
    hands_on,
    hands_on_tab,
    talk_tab,
    training_tab,
    view,
)  # fmt: skip
from .controls import gr
from .desk import Desk, Visitor
from .facts import Facts
from .worker import ModelThread

if TYPE_CHECKING:
    from mlx_hiermem.bank.reader import BlockReader

_FONT = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

#: Escape does what Stop does.
_KEYS = """() => {
  document.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return;
    for (const button of document.querySelectorAll('button.hm-stop'))
      if (!button.disabled && button.offsetParent) button.click();
  });
}"""


class Demo:
    """The page.

    Args:
        thread: a started :class:`ModelThread`.
        facts: what its ``start`` returned.
        name: of the model, for the page.
        reader: opens the bank's files anew, to verify them in another thread.
        run: folder of a training run, whose curves are shown.
    """

    def __init__(
        self,
        thread: ModelThread,
        facts: Facts,
        name: str,
        reader: Callable[[], BlockReader],
        run: Path | None = None,
    ) -> None:
        assert facts.config is not None
        self.run = run
        self.name = name
        self._uses = bank_tab.UseCounter(facts.config)
        self.desk = Desk(thread, facts, name, self._uses)
        self._verification = bank_tab.Verification(reader)

    def page(self) -> gr.Blocks:
        """The page, ready to launch."""
        desk, facts = self.desk, self.desk.facts
        with gr.Blocks(title=f"{self.name} · mlx-hiermem", analytics_enabled=False) as page:
            gr.HTML(view.head(self.name, facts))
            own = gr.HTML(hands_on.own(Visitor(), facts), elem_id="own")
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Ask"):
                    asked = ask_tab.build(desk)
                with gr.Tab("Side by side"):
                    compared = compare_tab.build(desk)
                with gr.Tab("Hands on"):
                    wires = hands_on_tab.build(desk)
                with gr.Tab("Conversation"):
                    talked = talk_tab.build(desk)
                if self.run is not None:
                    with gr.Tab("Training"):
                        training_tab.build(self.run)
                with gr.Tab("Bank"):
                    bank_tab.build(facts.bank, self._verification, self._uses, facts.names)
            wires.connect(own, [asked, compared, wires.tree, talked])

            def leave(request: gr.Request) -> None:
                desk.leave(request.session_hash)

            page.unload(leave)
        return page.queue(max_size=controls.VISITORS)

    def close(self) -> None:
        """End what runs."""
        self._verification.close()
        self.desk.thread.close()


def serve(demo: Demo, host: str, port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Args:
        host: address to listen on.
        port: to listen on.
        browser: open the page in the browser, where there is one.

    Raises:
        InputError: the address cannot be listened on.
    """
    # Gradio asks its own server whether it is up: no proxy of the environment may be in between.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost")))
    page = demo.page()
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=_FONT, font_mono=_MONO
    )
    folder = Path(__file__).parent
    styles = [folder / name for name in ("style.css", "parts.css", "tree.css")]
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, footer_links=[], max_file_size="1mb",
            theme=theme, css_paths=styles, js=_KEYS,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"{host}, port {port}: cannot be listened on ({error})") from error
    print(f"{demo.name} is at {url} (Ctrl-C ends it)", flush=True)
    try:
        if browser and _has_browser():
            webbrowser.open(url)
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        page.close(verbose=False)
        demo.close()


def _has_browser() -> bool:
    """Whether a browser with windows can be opened here; one of the terminal would take it over."""
    if os.name == "posix" and os.uname().sysname != "Darwin":
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True
