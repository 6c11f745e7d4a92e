import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import (
    Bootstrap,
    holm,
    hypervolume_difference,
    interval,
    p_value,
    resampled_means,
    resampled_rewards,
    reward_at,
)

SURE = Bootstrap(0.95, 400, 0)


def test_resampled_means_draw_the_same_prompts_for_equal_seeds():
    values = np.random.default_rng(0).normal(size=(30, 2, 3))
    means = resampled_means(values, Bootstrap(0.95, 500, 1))
    assert means.shape == (500, 2, 3)
    np.testing.assert_allclose(resampled_means(values + 7, Bootstrap(0.95, 500, 1)), means + 7)
    np.testing.assert_allclose(means.mean(0), values.mean(0), atol=0.05)
    spread = values.std(0) / np.sqrt(30)
    np.testing.assert_allclose(means.std(0), spread, rtol=0.2)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_a_method_that_is_better_everywhere_has_the_larger_hypervolume(seed):
    generator = np.random.default_rng(seed)
    one = generator.uniform(0.2, 0.8, size=(25, 3, 2))
    same, low, high, p = hypervolume_difference(one, one, (0.0, 0.0), SURE)
    assert same == low == high == 0 and p == 1
    more, low, high, p = hypervolume_difference(one + 0.1, one, (0.0, 0.0), SURE)
    assert 0 < low <= more <= high and p == pytest.approx(2 / 401)
    less, *_ = hypervolume_difference(one, one + 0.1, (0.0, 0.0), SURE)
    assert less == pytest.approx(-more)


def test_noise_between_methods_is_no_difference():
    generator = np.random.default_rng(3)
    shared = generator.uniform(0, 1, size=(60, 1, 2))
    one, other = (shared + generator.normal(0, 0.2, size=(60, 3, 2)) for _ in range(2))
    _, low, high, p = hypervolume_difference(one, other, (-1.0, -1.0), SURE)
    assert low < 0 < high and p > 0.05


def test_reward_is_interpolated_between_points_and_unknown_beyond_them():
    kl, reward = np.array([10.0, 0.0, 4.0]), np.array([0.8, 0.2, 0.6])
    np.testing.assert_allclose(reward_at(kl, reward, np.array([0.0, 2.0, 4.0, 7.0, 10.0])), [0.2, 0.4, 0.6, 0.7, 0.8])
    assert np.isnan(reward_at(kl, reward, np.array([10.1]))).all()


def test_the_band_of_a_curve_holds_it_and_shrinks_with_prompts():
    generator, at = np.random.default_rng(0), np.array([2.0, 5.0])

    def widths(prompts):
        reward = np.array([0.2, 0.6, 0.8]) + generator.normal(0, 0.3, size=(prompts, 3))
        kl = np.array([0.0, 4.0, 10.0]) + generator.normal(0, 0.5, size=(prompts, 3))
        rewards = resampled_rewards(kl, reward, at, SURE)
        bands = [interval(rewards[:, place], 0.95) for place in range(2)]
        exact = reward_at(kl.mean(0), reward.mean(0), at)
        assert all(low < value < high for (low, high), value in zip(bands, exact, strict=True))
        return np.array([high - low for low, high in bands])

    assert (widths(400) < 0.6 * widths(40)).all()


def test_holm_by_hand():
    found = holm(np.array([0.01, np.nan, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, np.nan, 0.06, 0.06, 0.02])


def test_of_many_differences_that_are_none_few_families_have_one_that_seems_so():
    """Thirteen methods that equal the fourteenth: uncorrected, one of them differs in every third table."""
    generator, naive, corrected = np.random.default_rng(0), 0, 0
    for seed in range(150):
        scores_PN = generator.normal(size=(40, 14))
        means_RN = resampled_means(scores_PN[:, :13] - scores_PN[:, 13:], Bootstrap(0.95, 600, seed))
        p_N = np.array([p_value(means_R) for means_R in means_RN.T])
        naive, corrected = naive + (p_N < 0.05).any(), corrected + (holm(p_N) < 0.05).any()
    assert naive / 150 > 0.25 and corrected / 150 < 0.12
