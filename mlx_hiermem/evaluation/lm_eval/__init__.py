"""The adapter for EleutherAI's lm-evaluation-harness (``lm_eval``; extra ``eval``).

``model`` scores lm-eval's requests with a memory for each document, ``routes`` says by which text a
document is routed, ``run`` runs tasks with several memories, and ``groups`` holds the paper's 13
tasks. Only ``run.available`` may be called where lm-eval is not installed.
"""
