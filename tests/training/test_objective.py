"""The objective against formulas written out, and documents against themselves alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import attach
from mlx_hiermem.training.objective import cross_entropy, document_mask, next_token_loss

ARGS = ModelArgs(16, 2, 32, 2, 8, vocab_size=40, tie_word_embeddings=True)


def anchor():
    mx.random.seed(0)
    model = Model(ARGS)
    init_weights(model)
    return model


def test_document_mask_equals_its_definition():
    tokens = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 7]])
    found = np.array(document_mask(mx.array(tokens), 0))
    for row, tokens_of_row in enumerate(tokens):
        document = [int((tokens_of_row[:t] == 0).sum()) for t in range(8)]
        for query in range(8):
            for key in range(8):
                allowed = key <= query and document[key] == document[query]
                assert found[row, 0, query, key] == allowed


def test_cross_entropy_and_its_gradient_equal_mlx():
    logits = mx.random.normal((3, 5, 40)) * 20
    targets = mx.random.randint(0, 40, (3, 5))
    weights = mx.random.normal((3, 5))

    def ours(logits):
        return (cross_entropy(logits, targets) * weights).sum()

    def theirs(logits):
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    assert mx.allclose(
        cross_entropy(logits, targets), nn.losses.cross_entropy(logits, targets), atol=1e-4
    )
    assert mx.allclose(mx.grad(ours)(logits), mx.grad(theirs)(logits), atol=1e-5)


def test_packed_documents_score_as_they_do_alone():
    model = attach(anchor(), MemoryConfig((3, 2), branching=2))
    memory = mx.random.normal((1, 2 * 3 * 5 * 16)) * 0.3
    documents = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    packed = mx.array([sum(([*d, 0] for d in documents), [])])
    loss, count = next_token_loss(model, packed, memory, end_of_text=0)

    total = 0.0
    for document in documents:
        tokens = mx.array([[*document, 0]])
        logits = model(tokens[:, :-1], memory=memory)
        total += nn.losses.cross_entropy(logits, tokens[:, 1:]).sum().item()
    assert count.item() == sum(map(len, documents))
    assert abs(loss.item() - total) < 1e-4
    unmasked, _ = next_token_loss(model, packed, memory, 0, mask_documents=False)
    assert abs(unmasked.item() - loss.item()) > 1e-3
