"""No line of ours runs code of a file or goes through a shell (docs/reliability.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for room in ("mlx_hiermem", "convert", "apps", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
)  # fmt: skip
#: The unpickler that allows nothing but tensors (docs/architecture.md).
UNPICKLER = ROOT / "convert" / "sources" / "pickles.py"
#: What options of functions may be, if they are given at all.
ONLY = {"trust_remote_code": False, "weights_only": True, "shell": False, "allow_pickle": False}
NEVER = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "pickle.load", "pickle.loads",
    "yaml.load", "yaml.unsafe_load", "torch.hub.load",
}  # fmt: skip
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def wrong(text: str) -> list[str]:
    """The lines of a source that should not be there."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in NEVER:
                found.append(ast.unparse(node))
            given = {one.arg: one.value for one in node.keywords}
        elif isinstance(node, ast.Dict):  # options that are handed on
            pairs = zip(node.keys, node.values, strict=True)
            given = {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if MODULES & {name.partition(".")[0] for name in names}:
                found.append(ast.unparse(node))
            continue
        else:
            continue
        for name in ONLY.keys() & given.keys():
            value = given[name]
            if not (isinstance(value, ast.Constant) and value.value is ONLY[name]):
                found.append(ast.unparse(node))
    return found


def test_the_sources():
    assert len(SOURCES) > 200
    found = {path: wrong(path.read_text(encoding="utf-8")) for path in SOURCES}
    found[UNPICKLER].remove("import pickle")
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "load(x, trust_remote_code=True)", "load(x, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}", "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system(x)",
        "import pickle", "from pickle import loads", "eval(x)", "yaml.load(x)",
    ],
)  # fmt: skip
def test_what_would_be_found(line):
    assert wrong(line)


@pytest.mark.parametrize("line", ["torch.load(x, weights_only=True)", "mx.eval(x)", "run(x)"])
def test_what_is_allowed(line):
    assert not wrong(line)
