"""Decoding with memories, through mlx-lm's own loops, and changing a memory.

``python -m benchmarks.decode [--anchor 410M]`` writes a random anchor, a bank and two LoRA adapters
into a folder of its own, measures, and removes it. Rows:

- ``decode.memory_vs_anchor``: tokens/s with a memory of about 10 % ÷ the bare anchor;
- ``decode.memory_vs_dense``: the same ÷ a dense model with as many run-time parameters;
- ``decode.mixed_vs_same``: tokens/s of 8 sequences with 8 memories ÷ 8 with the very same one, both
  as mlx-lm's ``BatchGenerator`` holds them, which is a copy for each sequence;
- ``decode.mixed_vs_shared``: the same ÷ a batch that reads one memory for all, as nothing in mlx-lm
  does: what it would gain not to copy;
- ``decode.prefill_vs_anchor``: tokens/s of a prompt with a memory ÷ without;
- ``swap.lora_vs_memory``: loading the model with another LoRA adapter, which is how mlx-lm changes
  one, ÷ fetching another memory into a new prompt cache.

Notable: what is decoded is one long answer for each model. They take turns of a few tokens, at the
same positions, and each turn ends when its last step is computed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream

from mlx_hiermem import load
from mlx_hiermem.backend import backend_name
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import InputError

from . import decode_models as models
from .decode_models import Sizes, options
from .fetch_bank import path_to
from .harness import Row, interleave, main, ratio
from .made_up import make_documents

NAME = "decode"
Turn = Callable[[], None]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    sizes = models.sizes(args.anchor, args.smoke)
    try:
        folder = Path(tempfile.mkdtemp(prefix="decode-", dir=args.folder))
    except OSError as error:
        raise InputError(f"--folder {args.folder}: cannot be written ({error.strerror})") from None
    try:
        models.write_model(folder / "model", sizes)
        lm = load(folder / "model")
        try:
            yield from one_sequence(lm, sizes)
            yield from batches(lm, sizes)
            yield prefill(lm, sizes)
            yield swap(lm, folder, sizes)
        finally:
            lm.bank.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prompts(sizes: Sizes, count: int, length: int) -> list[list[int]]:
    """Random tokens, the same in each run."""
    rng = np.random.default_rng(0)
    return rng.integers(1, sizes.anchor.vocab_size, (count, length)).tolist()


def about_memory(lm: MemoryLM, sizes: Sizes) -> str:
    """What is decoded with."""
    anchor, fetched = models.parameters(lm.model.anchor), lm.bank.config.fetch_size()
    return (
        f"ranks {','.join(map(str, sizes.ranks))}: a memory of {fetched:,} parameters, "
        f"{100 * fetched / anchor:.1f} % of the anchor's {anchor:,}, {_dtype(lm)} on "
        f"{backend_name()}"
    )


def _dtype(lm: MemoryLM) -> str:
    return str(lm.dtype).removeprefix("mlx.core.")


# ---- one sequence ----------------------------------------------------------------------


def one_sequence(lm: MemoryLM, sizes: Sizes) -> Iterator[Row]:
    """With a memory, the bare anchor, and a dense model, in turns of some tokens."""
    compared = contestants(lm, sizes)
    with ExitStack() as stack:
        tasks = {name: _answer(stack, sizes, *one) for name, one in compared.items()}
        times = interleave(tasks, sizes.rounds, warmup=2)
    bare, dense = (compared[name][0] for name in ("anchor", "dense"))
    read, fetched = models.read_per_token(bare), lm.bank.config.fetch_size()
    about = f"{about_memory(lm, sizes)}; {sizes.tokens} tokens a round"
    bound = (
        f"bound {read / (read + fetched):.3f}, by the bytes that a token reads: "
        f"{_megabytes(read, lm)} ÷ ({_megabytes(read, lm)} + {_megabytes(fetched, lm)})"
    )
    yield ratio(
        "decode.memory_vs_anchor", times, "anchor", "memory", ">= 0.88", f"{about}; {bound}"
    )
    wide = (
        f"FFN {sizes.anchor.intermediate_size} + {sizes.widening} wide: "
        f"{models.parameters(dense):,} parameters, exactly the anchor's and the memory's"
    )
    yield ratio("decode.memory_vs_dense", times, "dense", "memory", ">= 1.0", wide)


def contestants(lm: MemoryLM, sizes: Sizes) -> dict[str, tuple[Any, list[Any] | None]]:
    """Models, each with its prompt cache, if that is not the model's own."""
    fetched = lm.fetch(path_to(lm.bank.config, 0))
    return {
        "anchor": (models.twin(lm.model.anchor), None),
        "memory": (lm.model, lm.model.make_cache(fetched.memory)),
        "dense": (models.dense(sizes, lm.dtype), None),
    }


def _megabytes(numbers: int, lm: MemoryLM) -> str:
    return f"{numbers * lm.dtype.size / 1e6:,.0f} MB"


def _answer(stack: ExitStack, sizes: Sizes, model: Any, cache: list[Any] | None) -> Turn:
    """A long answer of which each turn decodes some tokens."""
    prompt = mx.array(prompts(sizes, 1, 16)[0])
    # -1: without end
    steps = generate_step(prompt, model, max_tokens=-1, prompt_cache=cache)
    stack.enter_context(closing(steps))

    def turn() -> None:
        for _ in range(sizes.tokens):
            next(steps)
        mx.synchronize(generation_stream)  # the loop is always one step ahead

    return turn


# ---- a batch ---------------------------------------------------------------------------


def batches(lm: MemoryLM, sizes: Sizes) -> Iterator[Row]:
    """As many memories as sequences against one."""
    with ExitStack() as stack:
        times = interleave(batch_tasks(stack, lm, sizes), sizes.rounds // 2, warmup=2)
    read, fetched = models.read_per_token(models.twin(lm.model.anchor)), lm.bank.config.fetch_size()
    about = (
        f"BatchGenerator, {sizes.batch} sequences, {sizes.batch_tokens} tokens of each a round, "
        f"{_dtype(lm)} on {backend_name()}"
    )
    bound = (read + fetched) / (read + sizes.batch * fetched)
    upper = f"bound {bound:.3f}, by the bytes that a step reads"
    shared = ratio(
        "decode.mixed_vs_shared", times, "shared", "mixed", "", f"one memory read for all; {upper}"
    )
    about += (
        f"; same: {sizes.batch} caches that hold one memory, which mlx-lm copies for each sequence "
        f"(mixed is {shared.value:.3f} of a batch that reads one for all)"
    )
    yield ratio("decode.mixed_vs_same", times, "same", "mixed", ">= 0.85", about)
    yield shared


def batch_tasks(stack: ExitStack, lm: MemoryLM, sizes: Sizes) -> dict[str, Turn]:
    """A batch with as many memories as sequences, with one, and with one that is not copied."""
    paths = [path_to(lm.bank.config, leaf) for leaf in _leaves(lm, sizes.batch)]
    fetched = [lm.fetch(path) for path in paths]
    memories = [one.memory for one in fetched]
    matrices = lm.model.matrices(memories[0])

    def shared(inputs: mx.array, cache: list[Any]) -> mx.array:
        return lm.model(inputs, cache=cache, memory=matrices)

    kinds = {
        "mixed": (lm.model, memories),
        "same": (lm.model, memories[:1] * sizes.batch),
        "shared": (shared, [None] * sizes.batch),
    }
    return {name: _batch(stack, lm, sizes, *kind) for name, kind in kinds.items()}


def _leaves(lm: MemoryLM, count: int) -> list[int]:
    """Leaves whose blocks differ at the deepest level that has memory."""
    config = lm.bank.config
    below = config.branching ** (config.levels - config.memory_levels[-1])
    return [number * below for number in range(count)]


def _batch(
    stack: ExitStack, lm: MemoryLM, sizes: Sizes, model: Any, memories: Sequence[mx.array | None]
) -> Turn:
    """Answers in one batch, of which each turn decodes some tokens."""
    generator = BatchGenerator(model, max_tokens=1 << 30)
    stack.callback(generator.close)
    caches = [lm.model.make_cache(memory) for memory in memories]
    generator.insert(prompts(sizes, len(memories), 16), caches=caches)

    def turn() -> None:
        for _ in range(sizes.batch_tokens):
            generator.next_generated()
        mx.synchronize(generator.stream)

    return turn


# ---- a prompt --------------------------------------------------------------------------


def prefill(lm: MemoryLM, sizes: Sizes) -> Row:
    """A prompt with a memory against the same without."""
    fetched = lm.fetch(path_to(lm.bank.config, 0))
    bare = models.twin(lm.model.anchor)
    prompt = mx.array(prompts(sizes, 1, sizes.prompt)[0])

    def read(model: Any, make_cache: Callable[[], list[Any] | None]) -> Turn:
        # max_tokens=0 ends when the first token is there, and begins no other step
        return lambda: list(generate_step(prompt, model, max_tokens=0, prompt_cache=make_cache()))

    tasks = {
        "anchor": read(bare, lambda: None),
        "memory": read(lm.model, lambda: lm.model.make_cache(fetched.memory)),
    }
    times = interleave(tasks, max(2, sizes.rounds // 4))
    fetched.release()
    about = f"prompt of {sizes.prompt} tokens, until the first token is there"
    return ratio("decode.prefill_vs_anchor", times, "anchor", "memory", "", about)


# ---- changing what the model knows -----------------------------------------------------


def swap(lm: MemoryLM, folder: Path, sizes: Sizes) -> Row:
    """Another LoRA adapter against another memory, both ready for the first token."""
    config = lm.bank.config
    # The first and the last leaf share no block.
    ends = [path_to(config, leaf) for leaf in (0, config.clusters(config.levels) - 1)]
    first = ends[0][0]  # the level-1 cluster of the last fetch, whose blocks are still there
    adapters = cycle(models.ADAPTERS)
    texts = cycle(make_documents(16, 30, seed=4))
    held: list[Any] = []  # what is replaced goes between the turns, not on anybody's time

    def lora(dtype: mx.Dtype) -> None:
        adapter = folder / next(adapters)
        held.append(models.load_with_adapter(folder / "model", adapter, dtype))

    def change(*where: Any) -> None:
        nonlocal first
        fetched = lm.fetch(*where)
        cache = lm.model.make_cache(fetched.memory)
        mx.eval(cache[-1].state)
        fetched.release()  # nothing is decoded with it
        held.append(cache)
        first = fetched.path.ids[0]

    tasks = {
        "lora": lambda: lora(lm.dtype),
        "memory": lambda: change(ends[ends[0][0] == first]),
        "routed": lambda: change("fetched", next(texts)),
        "stored": lambda: lora(mx.bfloat16),
    }
    times = interleave(tasks, max(2, sizes.rounds // 3), warmup=2, before=held.clear)
    others = {
        "with a prompt of about 30 words to route first": ("lora", "routed"),
        "with the model left in bfloat16, whatever that costs later": ("stored", "memory"),
    }
    also = [f"{ratio('', times, *two, '').value:.1f} {text}" for text, two in others.items()]
    size = models.lora_size(sizes.anchor, models.lora_rank(sizes.anchor, config.fetch_size()))
    about = (
        f"adapter of {size:,} parameters, memory of {config.fetch_size():,}, all in bfloat16 in "
        f"the page cache, and in {_dtype(lm)} ready for the first token; lora: load_model and "
        f"load_adapters of mlx-lm, without the tokenizer; memory: fetch of a path that shares no "
        f"block with the last, and a new prompt cache; {', '.join(also)}"
    )
    return ratio("swap.lora_vs_memory", times, "lora", "memory", ">= 20", about)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
