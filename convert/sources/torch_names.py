"""What a pickle of torch.save may name, and what stands for it.

The formats are those of PyTorch 1.6 to 2.13, protocol 2: a tensor is one of the ``_rebuild_*``
functions called with a storage (a record of the archive, by its key), an offset, sizes and
strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.shapes import shown

from .dtypes import ITEMSIZE, STORAGES, is_sizes, row_major
from .pickles import Ignored, Name, Refused


@dataclass(frozen=True)
class Storage:
    """A record ``data/<key>`` of the archive: ``numel`` numbers of ``dtype`` ("": bytes)."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.numel * ITEMSIZE.get(self.dtype, 1)


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as its pickle has it; ``offset`` and ``strides`` are in numbers, not in bytes."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def start(self) -> int:
        """Where it starts in its storage, in bytes.

        Raises:
            Refused: it has gaps, another order than row-major, or ends behind its storage.
        """
        numel, item = math.prod(self.shape), ITEMSIZE[self.dtype]
        if numel > 0:
            steps = zip(self.shape, self.strides, row_major(self.shape), strict=True)
            if any(size > 1 and stride != step for size, stride, step in steps):
                raise Refused("is not contiguous; save it with .contiguous()")
            if (self.offset + numel) * item > self.storage.nbytes:
                raise Refused(
                    f"of shape {shown(self.shape)} at {shown(self.offset)} does not lie in its "
                    f"storage of {shown(self.storage.nbytes)} bytes; the file is damaged"
                )
        return self.offset * item if numel else 0


def persistent(pid: Any) -> Storage:
    """Stands for a storage: ("storage", class, key, device, length).

    Raises:
        Refused: it is something else.
    """
    if type(pid) is tuple and len(pid) == 5:
        kind, storage, key, _, numel = pid
        known = type(storage) is Name and storage.text in STORAGES
        if known and type(kind) is str and kind == "storage" and type(key) is str:
            if type(numel) is int and 0 <= numel < 2**60:
                return Storage(key, STORAGES[storage.text], numel)
    raise Refused("its pickle refers to something that is no storage of torch.save")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> PickledTensor:
    # rest: requires_grad, hooks, metadata
    return _make(storage, getattr(storage, "dtype", ""), offset, shape, strides, rest[2:])


def _tensor_with_dtype(*all_of: Any) -> PickledTensor:
    # storage, offset, shape, strides, requires_grad, hooks, dtype, metadata
    dtype = all_of[6]
    if type(dtype) is not Name:
        raise Refused("its pickle has a tensor without a dtype")
    storage, offset, shape, strides = all_of[:4]
    named = dtype.text.removeprefix("torch.")
    return _make(storage, named, offset, shape, strides, all_of[7:])


def _make(
    storage: Any, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any
) -> PickledTensor:
    if type(storage) is not Storage or dtype not in ITEMSIZE:
        raise Refused("its pickle has a tensor without a storage, or of an unknown dtype")
    if not is_sizes(shape) or not is_sizes(strides) or len(shape) != len(strides):
        raise Refused("its pickle has a tensor whose sizes or strides are no sizes")
    if type(offset) is not int or not 0 <= offset < 2**60:
        raise Refused("its pickle has a tensor that starts before its storage, or nowhere")
    # A tensor with one of these bits is not what its numbers say.
    if any(metadata):
        raise Refused(
            "has a tensor that is marked as negative or conjugate; save it with .resolve_neg() "
            "and .resolve_conj()"
        )
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> PickledTensor:
    if type(data) is not PickledTensor:
        raise Refused("its pickle has a parameter that is no tensor")
    return data


def _with_attributes(function: Any, kind: Any, arguments: Any, *_: Any) -> PickledTensor:
    # A tensor that somebody set an attribute of. A subclass does not get here: its name is refused.
    if type(function) is Name and function.call in _MAKERS and type(arguments) is tuple:
        if type(kind) is Name and kind.text in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return function.call(*arguments)
    raise Refused("its pickle has a tensor that is made in an unknown way")


_MAKERS: tuple[Callable[..., PickledTensor], ...] = (_tensor, _tensor_with_dtype, _parameter)


def size(values: Any = ()) -> tuple[int, ...]:
    """Stands for ``torch.Size``.

    Raises:
        Refused: ``values`` are no sizes.
    """
    if not is_sizes(values):
        raise Refused("its pickle has a torch.Size of something that is no size")
    return tuple(values)


def table(*values: Any) -> dict[str, Any]:
    """Stands for ``collections.OrderedDict``, which a pickle makes empty and fills afterwards.

    Raises:
        Refused: it is made of ``values``, whose keys nobody has checked.
    """
    if values:
        raise Refused("its pickle makes an OrderedDict in an unknown way")
    return {}


#: Constants: dtypes, storage classes, and classes that are only passed on.
CONSTANTS = {
    **{f"torch.{name}": None for name in ITEMSIZE},
    **dict.fromkeys(STORAGES),
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
}

_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": size,
    "collections.OrderedDict": table,
    # Of optimizers, schedulers and counters: the same that weights_only allows.
    "torch.device": Ignored,
    "torch.serialization._get_layout": Ignored,
    "collections.Counter": Ignored,
    "builtins.set": Ignored,
    "__builtin__.set": Ignored,
    "builtins.complex": Ignored,
    "__builtin__.complex": Ignored,
    "_codecs.encode": Ignored,
}

#: All that a pickle of torch.save may name.
NAMES = {text: Name(text, call) for text, call in {**CONSTANTS, **_CALLS}.items()}

# Parts of names, and what to do about them.
_ADVICE = {
    "sparse": ": a sparse tensor; save it with .to_dense()",
    "_rebuild_q": ": a quantized tensor; save it with .dequantize()",
    "torch.Q": ": a quantized tensor; save it with .dequantize()",
    "nested": ": a nested tensor; save its parts as tensors of their own",
    "torch.distributed": ": a distributed tensor; save with torch.distributed.checkpoint, or each "
    "tensor with .full_tensor()",
    "_rebuild_meta_tensor": ": a tensor on the meta device, which has no numbers",
    "numpy": ": save numbers with .item() and arrays with torch.from_numpy()",
    "argparse.Namespace": ": the arguments of the run; save the checkpoint again without them "
    "(torch.save of its state_dict alone)",
}


def advice(text: str) -> str:
    """What to do about a name that is refused."""
    for part, words in _ADVICE.items():
        if part in text:
            return words
    return "; if you trust the file, load it and save its state_dict alone, or as safetensors"
