"""Measures the agent beside the bare work and beside the published agent: `python -m bench`, or `make bench`.

`python -m bench.rows` measures what rows cost.
"""
