"""Counters, conditions and the log: what the agent reports about its own health."""
