"""Intervals and tests against scipy, exhaustive resampling and hand computation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from jaxseg.evaluation import statistics
from jaxseg.evaluation.statistics import bootstrap_interval, paired_bootstrap, t_interval, wilcoxon

nan, inf = math.nan, math.inf


def exhaustive_means(values):
    """Means of all n^n resamples, the distribution that a bootstrap draws from."""
    return np.array([np.mean(r) for r in itertools.product(values, repeat=len(values))])


def test_interval_is_that_of_all_resamples():
    values = [0.1, 0.35, 0.8, 0.92, 0.4, 0.66]
    expected = np.quantile(exhaustive_means(values), [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(values), expected, atol=0.01)


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2, size=60)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values), expected, atol=0.02)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    num_covered = sum(
        low <= 5 <= high
        for low, high in (bootstrap_interval(rng.normal(5, 2, 40), seed=s) for s in range(200))
    )
    assert 180 <= num_covered <= 198  # of 200; the percentile bootstrap is a little too narrow


@pytest.mark.parametrize("extra", [nan, inf, -inf])
def test_what_is_not_finite_is_left_out(extra):
    values = [0.1, 0.5, 0.9]
    assert bootstrap_interval([extra, *values, extra]) == bootstrap_interval(values)


@pytest.mark.parametrize("values", [[], [0.5], [nan, 0.5, inf], [nan, nan]])
def test_fewer_than_two_cases_have_no_interval(values):
    assert np.isnan(bootstrap_interval(values)).all()


def test_equal_cases_have_an_interval_without_width():
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_resampling_depends_on_the_seed_alone(monkeypatch):
    values = np.random.default_rng(3).random(30)
    first = bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) == first != bootstrap_interval(values, seed=8)
    monkeypatch.setattr(statistics, "_BLOCK_VALUES", 1000)  # 33 resamples at once
    np.testing.assert_allclose(bootstrap_interval(values, seed=7), first, rtol=1e-12)


def test_t_interval_by_hand():
    found = t_interval([0.7, 0.8, 0.9])  # sd 0.1, and t is 4.3027 with 2 degrees of freedom
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.8) and found["sd"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx((0.8 - half, 0.8 + half), abs=1e-7)
    assert found["num"] == 3


def test_t_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(0.8, 0.05, 5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(t_interval(values)["interval"], expected, rtol=1e-12)


def test_t_interval_covers_the_true_mean_of_few_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = (t_interval(rng.normal(5, 2, 3))["interval"] for _ in range(2000))
    share = np.mean([low <= 5 <= high for low, high in intervals])
    assert share == pytest.approx(0.95, abs=0.015)  # a bootstrap of 3 covers about 0.7


@pytest.mark.parametrize("extra", [nan, inf])
def test_t_interval_counts_what_is_finite(extra):
    assert t_interval([0.5, extra, 0.75]) == t_interval([0.5, 0.75])
    alone = t_interval([extra, 0.5])
    assert (alone["mean"], alone["num"]) == (0.5, 1)
    assert np.isnan([alone["sd"], *alone["interval"]]).all()
    assert np.isnan(t_interval([extra])["mean"])


def test_paired_bootstrap_is_that_of_all_resamples():
    a, b = np.array([0.9, 0.8, 0.7, 0.75, 0.6, 0.5]), np.array([0.85, 0.82, 0.6, 0.7, 0.62, 0.4])
    means = exhaustive_means(a - b)
    found = paired_bootstrap(a, b)
    assert found["difference"] == pytest.approx((0.05 - 0.02 + 0.1 + 0.05 - 0.02 + 0.1) / 6)
    np.testing.assert_allclose(found["interval"], np.quantile(means, [0.025, 0.975]), atol=0.004)
    assert found["p"] == pytest.approx(2 * np.mean(means <= 0), abs=0.01)
    assert found["num"] == 6


def test_swapped_models_swap_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 25))
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert back["difference"] == -there["difference"]
    np.testing.assert_allclose(back["interval"], np.negative(there["interval"])[::-1])
    assert back["p"] == there["p"]


def test_p_is_small_exactly_where_the_interval_leaves_out_zero():
    rng = np.random.default_rng(5)
    for shift in np.linspace(-1, 1, 21):
        found = paired_bootstrap(rng.normal(shift, 1, 20), np.zeros(20))
        low, high = found["interval"]
        assert (found["p"] < 0.05) == (low > 0 or high < 0)


def test_equal_models_do_not_differ():
    found = paired_bootstrap([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert found == {"difference": 0.0, "interval": (0.0, 0.0), "p": 1.0, "num": 3}


def test_cases_count_where_both_models_have_a_score():
    a, b = [0.9, nan, 0.8, 0.5, inf], [0.7, 0.4, nan, 0.6, 0.1]
    found = paired_bootstrap(a, b)
    assert found["num"] == 2
    assert found["difference"] == pytest.approx(0.05)
    assert wilcoxon(a, b) == wilcoxon([0.9, 0.5], [0.7, 0.6])


@pytest.mark.parametrize(("a", "difference"), [([0.75], 0.25), ([nan], nan)])
def test_a_single_pair_says_nothing_about_spread(a, difference):
    found = paired_bootstrap(a, [0.5])
    assert found["difference"] == pytest.approx(difference, nan_ok=True)
    assert np.isnan([*found["interval"], found["p"]]).all()


def exact_wilcoxon(difference):
    """Two-sided p of the signed-rank sum over all signs; differences of unlike size, none 0."""
    ranks = stats.rankdata(np.abs(difference))
    observed = ranks[difference > 0].sum()
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))]
    centre = ranks.sum() / 2
    return np.mean(np.abs(np.subtract(sums, centre)) >= abs(observed - centre) - 1e-12)


def test_wilcoxon_is_exact_over_all_signs():
    rng = np.random.default_rng(6)
    for shift in (0, 0.5, 2):
        difference = rng.normal(shift, 1, 9)
        assert wilcoxon(difference, np.zeros(9)) == pytest.approx(exact_wilcoxon(difference))


def test_wilcoxon_drops_cases_without_a_difference():
    difference = np.array([0.3, -0.1, 0.7, 0.4, 0.55])
    padded = np.concatenate([difference, np.zeros(4)])
    assert wilcoxon(padded, np.zeros(9)) == pytest.approx(exact_wilcoxon(difference))


def test_wilcoxon_without_any_difference():
    assert wilcoxon([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert np.isnan(wilcoxon([], []))


@pytest.mark.parametrize("test", [paired_bootstrap, wilcoxon])
def test_unlike_numbers_of_cases_are_refused(test):
    with pytest.raises(ValueError, match="2 scores can not be paired with 3"):
        test([0.1, 0.2], [0.1, 0.2, 0.3])
