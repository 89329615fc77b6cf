"""The evidence: every figure and table of the paper, and the questions it left open, on the atlas.

``python -m benchmarks.studies.NAME [--smoke] [--json FILE] [--png FILE]``; docs/results.md has what
came out.
"""
