"""Benchmark of this agent, the published agent and the bare work: `make bench`, or `python -m bench`."""
