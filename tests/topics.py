"""What tests of topic changes share: paths to follow, and tiny models that talk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_hiermem.engine import Response
from mlx_hiermem.routing.tree import ClusterPath
from tests.tiny import make_tiny_model

#: Paths in a tree of three levels: a leaf, its neighbour, and two leaves in other subtrees.
A, NEAR, B, C = (0, 1, 3), (0, 1, 4), (2, 7, 21), (1, 3, 9)

#: ``u:...`` and ``a:...``, each on a line.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
#: Writes an answer otherwise than it was given, from its third letter on.
REWRITING = TEMPLATE.replace(
    "m.content +", "(m.content[:2] + '~' + m.content[2:] if m.role == 'assistant' else m.content) +"
)


def follower(texts: list[str], *paths: tuple[int, ...]) -> Callable[[str], ClusterPath]:
    """A router that gives these paths one after the other, the last for good; notes the texts."""
    ahead = list(paths)

    def route(text: str) -> ClusterPath:
        texts.append(text)
        return ClusterPath(ahead.pop(0) if len(ahead) > 1 else ahead[0], ())

    return route


def tokens_of(pieces: Iterable[Response]) -> list[int]:
    """The tokens of an answer."""
    return [piece.token for piece in pieces]


def sources(piece: Response) -> list[str]:
    """Where each level of a piece's memory came from."""
    return [block.source for block in piece.fetch.blocks]


def make_chat_models(folder: Path) -> dict[str, Path]:
    """Write the models "chat", "rewriting" and "plain"; random weights, three levels, float32."""
    templates = {"chat": TEMPLATE, "rewriting": REWRITING, "plain": None}
    return {name: _make_model(folder / name, template) for name, template in templates.items()}


def _make_model(folder: Path, template: str | None) -> Path:
    make_tiny_model(folder, ranks=(4, 2, 2))
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
