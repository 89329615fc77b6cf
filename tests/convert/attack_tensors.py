"""Archives whose tensors reach beyond their numbers, or are not what their numbers say."""

from __future__ import annotations

from .attacks import (
    Maker,
    archive,
    checkpoint,
    integer,
    of_bytes,
    of_pickle,
    records,
    sizes,
    storage,
    tensor,
    text,
)

#: Tensors that reach beyond their numbers, or are not what their numbers say.
TENSORS: dict[str, tuple[Maker, str]] = {
    "offset beyond": (of_pickle(checkpoint(tensor(offset=1))), "does not lie in its storage"),
    "huge offset": (of_pickle(checkpoint(tensor(offset=2**63))), "nowhere"),
    "offset before": (of_pickle(checkpoint(tensor(offset=-1))), "before its storage"),
    "shape beyond": (of_pickle(checkpoint(tensor((3, 3)))), "does not lie in its storage"),
    "overflowing shape": (
        of_pickle(checkpoint(tensor((2**32, 2**32), (2**32, 1)))),
        "no sizes",
    ),
    "negative size": (of_pickle(checkpoint(tensor((-2, -3)))), "no sizes"),
    "strides beyond": (of_pickle(checkpoint(tensor(strides=(1000, 1)))), "contiguous"),
    "strides of zero": (of_pickle(checkpoint(tensor((1000, 3), (0, 1)))), "contiguous"),
    "negative strides": (of_pickle(checkpoint(tensor(strides=(-3, 1)))), "no sizes"),
    "transposed": (of_pickle(checkpoint(tensor((3, 2), (1, 3)))), "contiguous"),
    "storage longer than its record": (
        of_pickle(checkpoint(tensor((1000,), (1,), held=storage(numel=1000)))),
        "24 bytes, expected 4000",
    ),
    "storage shorter than its record": (
        of_pickle(checkpoint(tensor((2,), (1,), held=storage(numel=2)))),
        "24 bytes, expected 8",
    ),
    "negative storage": (of_pickle(checkpoint(tensor(held=storage(numel=-6)))), "no storage"),
    "record elsewhere": (
        of_pickle(checkpoint(tensor(held=storage(text("../data.pkl"))))),
        "no record data/",
    ),
    "record missing": (
        of_pickle(checkpoint(tensor(held=storage(text("1"))))),
        "no record data/'1'",
    ),
    "negative bit": (
        of_pickle(checkpoint(tensor(rest=b"}" + text("neg") + b"\x88s"))),
        "resolve_neg",
    ),
    "unknown storage": (
        of_pickle(checkpoint(tensor(held=storage(kind="torch\nfloat32")))),
        "no storage",
    ),
    "storage of another object": (
        of_pickle(checkpoint(b"(" + text("module") + b"NNNNtQ")),
        "no storage",
    ),
    "part of a number": (
        of_pickle(
            checkpoint(
                tensor().replace(integer(0) + sizes((2, 3)), b"G?\xe0" + bytes(6) + sizes((2, 3)))
            )
        ),
        "nowhere",
    ),
    "tensor for a storage": (of_pickle(checkpoint(tensor(held=tensor()))), "without a storage"),
    "no storage": (of_pickle(checkpoint(tensor(held=b"N"))), "without a storage"),
    "storage without a dtype": (
        of_pickle(checkpoint(tensor(held=storage(kind="torch.storage\nUntypedStorage")))),
        "of an unknown dtype",
    ),
    "no dtype": (
        of_pickle(
            checkpoint(
                b"ctorch._utils\n_rebuild_tensor_v3\n("
                + storage()
                + b"K\0))\x89N"
                + text("float32")
                + b"tR"
            )
        ),
        "without a dtype",
    ),
    "parameter of a text": (
        of_pickle(checkpoint(b"ctorch._utils\n_rebuild_parameter\n(" + text("w") + b"\x89NtR")),
        "parameter that is no tensor",
    ),
    "tensor of an unknown maker": (
        of_pickle(
            checkpoint(
                b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nctorch\nTensor\n)NtR"
            )
        ),
        "unknown way",
    ),
    "strides of other axes": (of_pickle(checkpoint(tensor(strides=(1,)))), "no sizes"),
    "big-endian": (
        of_bytes(archive({**records(checkpoint(tensor())), "x/byteorder": b"big"})),
        "little-endian",
    ),
    "no tensors": (of_pickle(b"\x80\x02}."), "its keys are none"),
}
