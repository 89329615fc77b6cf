"""Key maps and memory_config.json that are not what they were: read, applied, and planned with."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from random import Random

from mlx_hiermem.convert.bank.description import CONFIG
from tests.convert.banks import plan, write
from tests.convert.checkpoints import write_foreign
from tests.convert.example import make_numbers
from tests.reliability.fuzz_mutations import WORDS, as_json
from tests.reliability.fuzz_process import FolderTarget

_MAP = "key_map.json"
#: Names as long as they are in earnest: what is slow on them is slow.
_PREFIX = "the_memory_bank_of_a_model_that_somebody_has_trained_long_ago/"
#: Expressions, those that would take for ever, and what takes their place.
_EXPRESSIONS = [
    ".*", "(.*)", "bank/(.*)", "(", "[", "a{99999999999}", "(?P<x>.*)", "(?P<x>a)(?P<x>b)", r"\1",
    "(?i)BANK.*", "(?#x)", "(?:a|b)*", "^$", "", "bank/steps|.*", "(?<=a)b", "(?<=a+)b",
    "((((.*))))", "(a?){60}a{60}",
    "(" * 200 + ".*" + ")" * 200, "\\", "\ud800", "x" * 9000, "(?R)", "(?>a)", "{1}", "*", "a**",
]  # fmt: skip
_SLOW = ["(\\w+/?)+!", "(\\w+)*\\.", "(bank/)?((\\w+)[/_])+x", "(.|\\w)*z", "[\\w/]*" * 30]
_NAMES = [
    "\\1", "\\2", "\\99", "\\g<1>", "\\g<x>", "\\g<0>", "\\", "memory.level\\1.\\2",
    "memory.level1.w1", "", "../x", "memory.level999999999.w1", "memory.level2.0.layers.0.w1",
    "x" * 99_999, "a\0b", "\ud800", "memory.generic.w1", "\\1" * 5000, "\\U0001F600",
    None, 1, [], {}, True,
]  # fmt: skip
#: Values for memory_config.json.
_CONFIG = {
    "kind": ["ffn", "kv", "lora_qk", "", 1], "branching": [0, 1, 2, 3, 4, 2**31, 2**62, -1],
    "levels": [0, 1, 2, 3, 61, 62, 2**40], "transposed": [["w3"], ["w9"], "w1", [[]], [1]],
    "ranks": [[4, 2], [4, 2, 1], [0, 0], [2**31, 2], [2**62] * 3, [1] * 10_000, [], [-1, 2]],
    "layers": [[0, 1], [0], [1, 0], [0, 0], [5], [2**40], list(range(9000)), []],
    "encoder": [{}, {"type": "bert"}, {"type": "x"}, {"type": "bert", "model": "../../x"}, []],
    "alpha": [2, 2.0, 1, "NaN", 1e999], "unknown": [1],
}  # fmt: skip


class KeyMaps(FolderTarget):
    """A bank under somebody else's names, the map for them, and what describes it."""

    def make(self) -> None:
        """Write them."""
        self.example = make_numbers()
        written = write_foreign(
            self.example, self.folder / "run", "safetensors", together=False, prefix=_PREFIX
        )
        self.bank = written.bank
        assert written.key_map is not None
        table = json.loads(written.key_map.read_text())
        table = {key.replace("^", f"^{_PREFIX}"): value for key, value in table.items()}
        (self.folder / _MAP).write_text(json.dumps(table))
        written.memory_config.rename(self.folder / CONFIG)
        self.number = 0
        self.look(Random(0))

    def change(self, random: Random) -> str:
        """Change one of the two files."""
        name = random.choice([_MAP, _MAP, CONFIG])
        data = self.files[name]
        if random.random() < 0.5:
            data = as_json(random, data)
        elif name == _MAP:
            table = json.loads(data)
            for _ in range(random.randint(1, 3)):
                items = list(table.items())
                slow = random.random() < 0.01
                known = _SLOW if slow else [*_EXPRESSIONS, *table]
                new = (random.choice(known), random.choice(_NAMES))
                items.insert(random.randint(0, len(items)), new)
                table = dict(items)
            if random.random() < 0.2:
                table[random.choice(WORDS)] = random.choice(WORDS)
            data = json.dumps(table).encode()
        else:
            table = json.loads(data)
            for key in random.sample(list(_CONFIG), 2):
                table[key] = random.choice(_CONFIG[key])
            data = json.dumps(table).encode()
        self.put(name, data)
        return f"{name}: {data[:400]!r}"

    def look(self, random: Random) -> None:
        """Plan a conversion, and now and then do it."""
        maps = {"key_map": self.folder / _MAP, "memory_config": self.folder / CONFIG}
        if random.random() < 0.9:
            with ExitStack() as stack:
                plan(self.example, self.bank, stack, **maps)
            return
        self.number += 1
        self.writes = True
        out = self.folder / f"out-{self.number}"
        write(self.example, self.bank, out, **maps).close()
        _only(out, "memory")


def _only(folder: Path, name: str) -> None:
    inside = {one.name for one in folder.iterdir() if not one.name.startswith(".")}
    assert inside == {name}, inside
