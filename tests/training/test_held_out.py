import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.evaluation.statistics import Bootstrap, share
from pipeline.training.held_out import held_out

LOGPS = [-10.0, -20.0, -30.0, -12.0, -11.0, -50.0]
LENGTHS = [10, 20, 30, 10, 11, 50]
SURE = Bootstrap(0.95, 2000, 0)


def wilson(right, cases):
    interval = binomtest(right, cases).proportion_ci(0.95, method="wilson")
    return pytest.approx((interval.low, interval.high))


def test_accuracy_is_the_share_of_pairs_in_which_chosen_is_likelier():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(0, 1), (2, 1), (0, 3), (4, 5)], [0, 1, 1, 2], SURE).accuracy
    assert (found.value, found.pairs, found.prompts) == (0.75, 4, 3)
    assert str(found) == f"0.750 [{found.ci_low:.3f}, {found.ci_high:.3f}], 4 pairs of 3 prompts"


def test_an_interval_covers_the_true_share_as_often_as_it_says_where_pairs_share_prompts():
    """Wilson's over the same pairs covers it far too seldom."""
    generator, covered, naive = np.random.default_rng(0), 0, 0
    for seed in range(200):
        prompts = np.repeat(np.arange(60), 4)
        right = generator.random(240) < np.repeat(generator.beta(0.7, 0.3, 60), 4)
        found = share(right, prompts, Bootstrap(0.95, 500, seed))
        covered += found.ci_low <= 0.7 <= found.ci_high
        interval = binomtest(int(right.sum()), 240).proportion_ci(0.95, method="wilson")
        naive += interval.low <= 0.7 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99 and naive / 200 < 0.85


def test_pairs_that_repeat_a_prompt_add_no_certainty():
    right, prompts = [True, False, True, True, False, True, True, False], range(8)
    once = share(right, prompts, SURE)
    often = share(right * 10, [*prompts] * 10, SURE)
    assert (often.ci_low, often.ci_high) == pytest.approx((once.ci_low, once.ci_high)) and often.pairs == 80


@pytest.mark.parametrize(
    ("right", "prompts", "cases"), [([True] * 9, [0, 0, 1, 1, 2, 2, 3, 3, 3], 4), ([False] * 3, [5] * 3, 1)]
)
def test_prompts_that_all_agree_have_wilsons_interval(right, prompts, cases):
    found = share(right, prompts, SURE)
    assert (found.ci_low, found.ci_high) == wilson(cases * right[0], cases)


def test_equally_long_means_within_a_tenth_of_the_longer_one():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(0, 3), (3, 4), (1, 0), (2, 0)], range(4), SURE)
    assert (found.length_matched.value, found.length_matched.pairs) == (0.5, 2)  # 10 and 10, 10 and 11; not 20 and 10


def test_a_judge_that_counts_tokens_is_right_where_the_chosen_response_is_longer():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(1, 0), (2, 0), (0, 5), (0, 3)], range(4), SURE).chosen_longer
    assert (found.value, found.pairs) == (pytest.approx(2 / 3), 3)  # pairs of one length are no case for it


def test_length_correlation_is_spearmans():
    assert held_out(
        [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [1, 2, 9], [(0, 1)], [0], SURE
    ).length_correlation == pytest.approx(-1)
    assert held_out(
        [-3.0, -2.0, -1.0], [-3.0, -2.0, -1.0], [1, 2, 9], [(0, 1)], [0], SURE
    ).length_correlation == pytest.approx(1)
    assert held_out([-3.0, -2.0], [-3.0, -2.0], [4, 4], [(0, 1)], [0], SURE).length_correlation is None


def test_no_pairs_are_said_to_be_none():
    assert share([], [], SURE).value is None
    assert str(share([], [], SURE)) == "no such pairs"
    assert held_out([], [], [], [], [], SURE).accuracy.pairs == 0


def test_accuracy_is_of_what_the_loss_compares_and_correlation_of_log_probabilities():
    found = held_out([2.0, 1.0, 0.0], [-1.0, -2.0, -3.0], [3, 2, 1], [(0, 1), (2, 1)], [0, 1], SURE)
    assert found.accuracy.value == 0.5
    assert found.length_correlation == pytest.approx(1)
