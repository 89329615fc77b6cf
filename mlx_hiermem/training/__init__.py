"""Train anchors and memories: pack a corpus, the objective, sparse rows, the loop."""
