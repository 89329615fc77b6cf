"""The demo page: a prompt, a streamed answer, and what was fetched for it.

- ``line``, ``tickets``, ``answers``, ``worker``: the thread that owns the model, and the queues to
  it; they know nothing of pages.
- ``facts``: what a page says about the model. ``desk``: what each visitor has.
- ``view``, ``meters``, ``compare``, ``hands_on``, ``talk``, ``tree_view``: answers and reports as
  HTML; they know nothing of Gradio.
- ``controls``, ``*_tab``: the parts of the Gradio page. ``app``: puts them together, and serves.
"""
