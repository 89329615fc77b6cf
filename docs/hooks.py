"""What mkdocs.yml calls while the site is built: pages that are made of something else.

- ``index.md`` is README.md, with links that hold within the site;
- ``model-card.md`` is the card of the model that ships;
- ``commands.md`` is what the program's own parsers say, so it cannot differ from ``--help``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
CARD = "mlx_hiermem/assets/atlas/README.md"

#: Files outside docs/ that are pages, and the names of these.
PAGES = {"README.md": "index.md", CARD: "model-card.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=_page(path)))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def _page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # of a model card, for the Hub
    for file, name in PAGES.items():
        text = text.replace(f"]({file})", f"]({name})")
    return re.sub(r"\]\(docs/", "](", text)


def commands_page() -> str:
    """Every subcommand with its help."""
    lines = [
        "# The command line",
        "",
        "`mlx_hiermem SUBCOMMAND`, or `python -m mlx_hiermem SUBCOMMAND`. Exit codes: 0 done, 2 "
        "wrong use or bad input (one line says what, where and what to do), 1 a fault of ours, "
        "130 interrupted. `--debug` shows the traceback of an error.",
        "",
    ]
    for title, depth, text in parsers():
        lines += [f"{'#' * (depth + 2)} {title}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def parsers() -> Iterator[tuple[str, int, str]]:
    """Name, depth below the subcommands (0 or 1) and help of each subcommand and each action."""
    from mlx_hiermem.cli import COMMANDS

    with patch.dict(os.environ, COLUMNS="78", NO_COLOR="1"):
        for name, summary in COMMANDS.items():
            parser = argparse.ArgumentParser(f"mlx_hiermem {name}", description=f"{summary}.")
            import_module(f"mlx_hiermem.commands.{name}").add_arguments(parser)
            yield name, 0, parser.format_help()
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    for inner, below in action.choices.items():
                        yield f"{name} {inner}", 1, below.format_help()


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles of docstrings (``:class:`X` ``) off: there are no such links here."""
    return re.sub(r":(?:class|meth|func|mod):(<code>)", r"\1", html)
