"""The Gradio page, and the server that runs it.

Notable:
- Handlers talk to the model's thread through tickets and never touch MLX.
- Nothing comes from outside: no analytics, system fonts, no share link, no footer links. The page
  itself asks only the address that it came from.
- What a visitor has running hangs on their session and is dropped when they leave: Gradio closes
  the generator, whose ``finally`` withdraws the ticket.
"""

from __future__ import annotations

import itertools
import os
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Gradio reads both on import or launch. The second would offer to keep prompts on the Hub.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr  # noqa: E402

from mlx_hiermem.errors import InputError  # noqa: E402

from . import view  # noqa: E402
from .worker import Ask, End, Facts, ModelThread, Ticket  # noqa: E402

#: Prompts to start from: rare facts of the atlas, in the wordings that no training text has.
EXAMPLES = (
    "The atomic number of hafnium is",
    "The chemical symbol of tungsten is",
    "The language code of Basque is",
    "The currency code of the Tenge is",
    "The country of the subdivision Hokkaido is",
)

#: Visitors who are answered or see their place in the line. As many more wait for a place in it;
#: the next are told that the queue is full.
VISITORS = 16

#: Characters of a prompt; far above any context, far below what would keep the tokenizer busy.
LONGEST_PROMPT = 100_000

#: Tokens that one visitor may ask for, so that the line moves.
LONGEST_ANSWER = 4096

#: Seconds between two updates of a page, so that drawing does not eat the speed it shows.
_PACE = 0.05

_FONT = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


class Demo:
    """The page's handlers.

    Args:
        thread: a started :class:`ModelThread`.
        facts: what its ``start`` returned.
        name: of the model, for the page.
    """

    def __init__(self, thread: ModelThread, facts: Facts, name: str) -> None:
        self.thread = thread
        self.facts = facts
        self.name = name
        self._tickets: dict[str | None, Ticket] = {}  # by session
        self._numbers = itertools.count(1)

    def answer(
        self, prompt: str | None, memory: str | None, max_tokens: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream one answer: (answer, report, Send, Stop) for each update of the page."""
        ask = Ask(prompt or "", memory or "fetched", int(max_tokens or 0))
        state = view.Answer(ask, next(self._numbers))
        if len(state.ask.prompt) > LONGEST_PROMPT:
            state.end = End(
                "error",
                f"the prompt has {len(state.ask.prompt):,} characters; this page takes "
                f"{LONGEST_PROMPT:,}; shorten it",
            )
            state.ask = Ask("")
            yield self._draw(state)
            return
        ticket = self.thread.submit(state.ask)
        session = request.session_hash
        self._tickets[session] = ticket
        pace = threading.Event()
        try:
            while state.end is None:
                state.ahead = self.thread.ahead(ticket)
                yield self._draw(state)
                pace.wait(_PACE)
                for update in ticket.take(timeout=0.5):
                    state.update(update)
            yield self._draw(state)
        finally:
            self.thread.withdraw(ticket)
            if self._tickets.get(session) is ticket:
                del self._tickets[session]

    def stop(self, request: gr.Request) -> None:
        """End what this visitor has running."""
        ticket = self._tickets.get(request.session_hash)
        if ticket is not None:
            self.thread.withdraw(ticket)

    def _draw(self, state: view.Answer) -> tuple[Any, ...]:
        running = state.end is None
        return (
            view.answer(state),
            view.report(state, self.facts),
            gr.Button(interactive=not running),
            gr.Button(interactive=running),
        )

    def page(self) -> gr.Blocks:
        """The page, ready to launch."""
        longest = min(self.facts.context_length or LONGEST_ANSWER, LONGEST_ANSWER)
        hint = "Ask a question" if self.facts.chat else "Begin a sentence; the model goes on"
        choices = [(label, value) for value, label, _ in view.MEMORIES]
        with gr.Blocks(title=f"{self.name} · mlx-hiermem", analytics_enabled=False) as page:
            gr.HTML(view.head(self.name, self.facts))
            prompt = gr.Textbox(
                label="Prompt", placeholder=hint, lines=1, max_lines=8, autofocus=True,
                elem_id="prompt",
            )  # fmt: skip
            gr.Examples(
                [[example] for example in EXAMPLES], prompt, label="Try one of these",
                elem_id="examples", api_visibility="private",
            )  # fmt: skip
            with gr.Row(equal_height=True):
                # Wide enough to stand one below the other on a phone.
                memory = gr.Radio(
                    choices, value="fetched", label="Memory", min_width=280, elem_id="memory"
                )
                tokens = gr.Slider(
                    1, longest, value=min(48, longest), step=1, label="Max tokens",
                    min_width=280, elem_id="max-tokens",
                )  # fmt: skip
            gr.HTML(view.legend())
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send", scale=3, min_width=100)
                stop = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=80)
            answer = gr.HTML(view.answer(None), elem_id="answer")
            report = gr.HTML(view.report(None, self.facts), elem_id="report")
            # The line of visitors is the model thread's own, which shows each their place; Gradio
            # only has to let all of them in. "once": Enter during an answer does not start another.
            gr.on(
                [send.click, prompt.submit], self.answer, [prompt, memory, tokens],
                [answer, report, send, stop], show_progress="hidden", trigger_mode="once",
                concurrency_id="model", concurrency_limit=VISITORS, api_visibility="private",
            )  # fmt: skip
            # Past the queue, so that it is heard while the answer runs.
            stop.click(self.stop, queue=False, show_progress="hidden", api_visibility="private")
        return page.queue(max_size=VISITORS)


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
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, footer_links=[], max_file_size="1mb",
            theme=theme, css_paths=[Path(__file__).with_name("style.css")],
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
        demo.thread.close()


def _has_browser() -> bool:
    """Whether a browser with windows can be opened here; one of the terminal would take it over."""
    if os.name == "posix" and os.uname().sysname != "Darwin":
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True
