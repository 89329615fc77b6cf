"""The site of the docs: it is built without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

import mlx_hiermem
from mlx_hiermem import errors
from mlx_hiermem.cli import COMMANDS
from tests.docs.pages import REPOSITORY
from tests.docs.parsing import actions, options_of


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built strictly: a warning, such as of a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    build(config)
    return folder


def text_of(page: Path) -> str:
    """What a page says, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*"
            r"(?:src|srcset|href|data)=[\"']?((?:https?:)?//[^\"'\s>]+)",
            text,
        )
        assert not loaded, f"{page.name}: {loaded}"
        for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.S):
            assert "//" not in style, page.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\([\"']?(https?:)?//", text), sheet.name
        assert not re.search(r"@import\s+[\"']?(https?:)?//", text), sheet.name


def test_every_page_is_in_the_menu():
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]

    def leaves(entry) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        values = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(leaves, values))

    written = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    assert leaves(nav) == written | {"index.md", "model-card.md", "commands.md"}


def test_the_readme_is_the_first_page(site):
    text = text_of(site / "index.html")
    assert "Five minutes to a memory of your own" in text
    assert (site / "images" / "demo-ask-light.png").is_file()


def test_the_reference_has_every_public_name(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'id="(mlx_hiermem[\w.]*)"', page))
    names = {heading.rpartition(".")[2] for heading in headings}
    assert names >= set(mlx_hiermem.__all__) - {"__version__"}
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names >= raised
    for method in ("route", "generate", "stream", "score", "perplexity", "prompt_cache", "fetch"):
        assert f"mlx_hiermem.engine.MemoryLM.{method}" in headings


def test_the_reference_has_no_roles_of_another_markup(site):
    assert not re.search(r":(class|meth|func|mod):", text_of(site / "api.html"))


def test_the_command_line_is_what_the_parsers_say(site):
    page = (site / "commands.html").read_text(encoding="utf-8")
    titles = [html.unescape(one) for one in re.findall(r"<h[23] id=\"([\w-]+)\"", page)]
    wanted = []
    for command in COMMANDS:
        wanted += [command, *(f"{command}-{action}" for action in actions(command))]
    assert titles == wanted
    sections = dict(zip(titles, re.split(r"<h[23] id=", page)[1:], strict=True))
    for command in COMMANDS:
        for action in actions(command) or [None]:
            section = sections[command if action is None else f"{command}-{action}"]
            for option in options_of(command, action) - {"--debug"}:
                assert re.search(rf"{option}\b", section), (command, action, option)
