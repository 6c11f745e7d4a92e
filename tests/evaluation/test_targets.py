"""Weights for an outcome: targets, the surface through what was measured, and what it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.evaluation.statistics import Bootstrap
from pipeline.evaluation.targets import WORST, Surface, Target, candidates

OBJECTIVES = ["one", "two"]
MEASURES = np.array([[0.9, 0.1, 20.0], [0.7, 0.6, 12.0], [0.6, 0.6, 6.0], [0.2, 0.8, 15.0], [0.3, 0.3, 0.0]])


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (Target({"one": 0.55}), 2),  # the least KL of those that reach it
        (Target({"one": 0.65}, "two"), 1),  # the best two of those that reach it
        (Target(maximise=WORST), 1),
        (Target(maximise=WORST, kl=8.0), 2),
        (Target(maximise="one", kl=13.0), 1),
        (Target({"two": 0.95}), 3),  # out of reach: the nearest
        (Target({"one": 0.9, "two": 0.6}), 1),  # misses a bound by 0.22 of it, others by more
    ],
)
def test_the_best_candidate_meets_the_bounds_first(target, place):
    assert target.best(MEASURES, OBJECTIVES) == place


def test_a_shortfall_is_a_share_of_the_bound():
    target = Target({"one": 0.8}, kl=10.0)
    assert target.shortfall(MEASURES, OBJECTIVES) == pytest.approx([1.0, 0.125 + 0.2, 0.25, 0.75 + 0.5, 0.625])
    assert Target(maximise="one").shortfall(MEASURES, OBJECTIVES).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target({"three": 0.5}), "no objective three: choose of one, two"),
        (Target(maximise="best"), "no objective best"),
        (Target(), "say what to maximise"),
        (Target(kl=8.0), "say what to maximise"),
        (Target(maximise="one", kl=0.0), "say a number above 0"),
        (Target(maximise="one", kl=float("nan")), "say a number above 0"),
        (Target({"one": float("inf")}), "is no bound"),
    ],
)
def test_a_target_that_says_nothing_is_refused(target, message):
    with pytest.raises(UserError, match=message):
        target.check(OBJECTIVES)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_candidates_fill_the_simplex_evenly(objectives):
    found_CM = candidates(1.5, objectives)
    assert found_CM.shape[1] == objectives and len(found_CM) >= 1000
    assert (found_CM >= 0).all() and (found_CM.sum(1) <= 1.5 + 1e-9).all()
    assert np.ptp(found_CM.mean(0)) < 0.01 and found_CM.max(0) == pytest.approx([1.5] * objectives)


def true_measures(weights_NM):
    """A smooth trade-off: each weight raises its own reward and lowers the other's; KL grows with both."""
    one, two = weights_NM.T
    return np.stack([np.tanh(2 * one) - 0.3 * two, np.tanh(2 * two) - 0.2 * one, 10 * (one + two) ** 1.5], axis=1)


def noisy(weights_NM, prompts, scale, seed=0):
    noise = np.random.default_rng(seed).normal(0, scale, (prompts, len(weights_NM), 3))
    return true_measures(weights_NM) + noise


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_the_surface_is_near_what_it_was_measured_of(seed):
    weights_NM, unseen_CM = candidates(1.5, 2)[seed : seed + 16], candidates(1.0, 2)[::40]
    surface = Surface(weights_NM, noisy(weights_NM, 40, 0.3, seed), Bootstrap(resamples=200))
    off_CK = np.abs(surface.predicted(unseen_CM) - true_measures(unseen_CM))
    assert np.median(off_CK[:, :2]) < 0.1 and np.median(off_CK[:, 2]) < 1.0


def test_intervals_hold_what_they_promise():
    """Prompts are drawn anew many times: the interval holds the truth about as often as it says."""
    weights_NM, place_M = candidates(1.5, 2)[:20], np.array([0.4, 0.3])
    truth_K, held = true_measures(place_M[None])[0], []
    for seed in range(60):
        surface = Surface(weights_NM, noisy(weights_NM, 50, 1.0, seed), Bootstrap(resamples=300, seed=seed))
        low_K, high_K = surface.interval(place_M)
        held.append((low_K <= truth_K) & (truth_K <= high_K))
    assert (np.mean(held, axis=0) > 0.8).all(), np.mean(held, axis=0)


def test_a_surface_through_exact_values_of_a_plane_is_that_plane():
    weights_NM = candidates(1.0, 2)[:12]
    plane_NK = weights_NM @ np.array([[1.0, 0.0, 10.0], [0.0, 1.0, 20.0]])
    found = Surface(weights_NM, plane_NK[None].repeat(3, 0), Bootstrap()).predicted(np.array([[0.2, 0.5]]))
    assert found[0] == pytest.approx([0.2, 0.5, 12.0], abs=1e-6)
