"""Benchmark of this agent, the published agent and the bare work: `make bench`, or `python -m bench`.

`python -m bench.rows` measures what rows cost.
"""
