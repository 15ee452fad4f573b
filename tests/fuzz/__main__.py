"""`python -m tests.fuzz --seconds N`: fuzz the parser and the whole monitor for N seconds, with random seeds."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.target import check_monitor, check_parse, datagrams


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> int:
    """Check `examples` values and return their number. A failure is raised, with the smallest example that fails."""
    count = 0

    @seed(random.randrange(2**63))
    @settings(deadline=None, max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal count
        count += 1
        check(value)

    run()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="default: %(default)s")
    end = time.monotonic() + parser.parse_args().seconds
    datagrams_parsed = batches_taken = 0
    while time.monotonic() < end:
        datagrams_parsed += fuzz(check_parse, datagrams(), 2000)
        batches_taken += fuzz(check_monitor, st.lists(datagrams(), max_size=30), 100)
    print(f"{datagrams_parsed} datagrams parsed and {batches_taken} batches taken by a monitor: nothing found")


if __name__ == "__main__":
    main()
