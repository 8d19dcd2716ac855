"""Means over seeds and their t-intervals."""

import pytest

from calm_fast.experiments import intervals


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_t_quantile_is_the_tables(df, quantile):
    assert intervals.t_quantile(df) == pytest.approx(quantile, abs=1e-4)


def test_interval_of_known_values():
    found = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * (2.5 / 5) ** 0.5
    assert found["mean"] == 3 and found["low"] == pytest.approx(3 - half, abs=1e-5)
    assert found["high"] == pytest.approx(3 + half, abs=1e-5)
    assert intervals.interval([7.0]) == {"mean": 7.0, "low": None, "high": None}
