"""The demo page: a prompt, a streamed answer, and what was fetched for it.

- ``worker``: the thread that owns the model, and the queues to it; knows nothing of pages.
- ``view``: answers and fetch reports as HTML; knows nothing of Gradio.
- ``app``: the Gradio page and its server; the only module that imports Gradio.
"""
