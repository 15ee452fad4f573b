"""The schedule of retries and re-checks, and when a file is given up."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.registration.lookup import is_given_up, recheck_delay, retry_delay


def test_the_delays_of_a_missing_file_double_from_a_tenth_of_a_second_to_a_minute() -> None:
    delays = [retry_delay(attempts) for attempts in range(1000)]
    assert delays[:10] == [pytest.approx(0.1 * 2**n) for n in range(10)]
    assert set(delays[10:]) == {60.0}


@given(attempts=st.integers(0, 10**6), give_up_after=st.floats(0, 1e9))
def test_a_file_is_given_up_once_it_was_looked_for_long_enough(attempts: int, give_up_after: float) -> None:
    first = min(attempts, 1000)  # the simple loop, and beyond it every delay is a minute
    looked_for = math.fsum(min(0.1 * 2**attempt, 60.0) for attempt in range(first)) + (attempts - first) * 60.0
    if not math.isclose(looked_for, give_up_after):
        assert is_given_up(attempts, give_up_after) == (looked_for >= give_up_after)


@pytest.mark.parametrize("give_up_after", [0.0, 0.1, 5.0, 3600.0, 86400.0])
def test_a_file_is_given_up_at_most_one_delay_late(give_up_after: float) -> None:
    looked_for = 0.0
    for attempts in itertools.count():
        if is_given_up(attempts, give_up_after):
            break
        looked_for += retry_delay(attempts)
    assert give_up_after <= looked_for < give_up_after + 60.1 or give_up_after == looked_for == 0.0


@pytest.mark.parametrize("attempts", [1023, 1024, 10**6, 2**62, 2**63 - 1])
def test_there_may_be_any_number_of_attempts(attempts: int) -> None:
    assert retry_delay(attempts) == 60.0
    assert is_given_up(attempts, 3600.0)
    assert not is_given_up(attempts, math.inf)


@given(rounds=st.integers(0, 2**63 - 1), settle_after=st.sampled_from([0.0, 0.3, 5.0, 60.0, 300.0]))
def test_the_delay_of_a_recheck_doubles_with_each_change_up_to_a_minute(rounds: int, settle_after: float) -> None:
    delay = recheck_delay(rounds, settle_after)
    assert recheck_delay(0, settle_after) == recheck_delay(1, settle_after) == settle_after
    assert settle_after <= delay <= max(settle_after, 60.0)
    if rounds:
        assert recheck_delay(rounds + 1, settle_after) == max(settle_after, min(2 * delay, 60.0))
