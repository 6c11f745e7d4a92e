import pytest
from scipy.stats import binomtest

from pipeline.evaluation import held_out, share

LOGPS = [-10.0, -20.0, -30.0, -12.0, -11.0, -50.0]
LENGTHS = [10, 20, 30, 10, 11, 50]


def test_accuracy_is_the_share_of_pairs_in_which_chosen_is_likelier_with_its_wilson_interval():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(0, 1), (2, 1), (0, 3), (4, 5)], 0.95).accuracy
    interval = binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert (found.value, found.pairs) == (0.75, 4)
    assert (found.ci_low, found.ci_high) == (interval.low, interval.high)
    assert str(found) == "0.750 (Wilson 0.301 to 0.954, 4 pairs)"


def test_equally_long_means_within_a_tenth_of_the_longer_one():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(0, 3), (3, 4), (1, 0), (2, 0)], 0.95)
    assert (found.length_matched.value, found.length_matched.pairs) == (0.5, 2)  # 10 and 10, 10 and 11; not 20 and 10


def test_a_judge_that_counts_tokens_is_right_where_the_chosen_response_is_longer():
    found = held_out(LOGPS, LOGPS, LENGTHS, [(1, 0), (2, 0), (0, 5), (0, 3)], 0.95).chosen_longer
    assert (found.value, found.pairs) == (pytest.approx(2 / 3), 3)  # pairs of one length are no case for it


def test_length_correlation_is_spearmans():
    assert held_out(
        [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [1, 2, 9], [(0, 1)], 0.95
    ).length_correlation == pytest.approx(-1)
    assert held_out(
        [-3.0, -2.0, -1.0], [-3.0, -2.0, -1.0], [1, 2, 9], [(0, 1)], 0.95
    ).length_correlation == pytest.approx(1)
    assert held_out([-3.0, -2.0], [-3.0, -2.0], [4, 4], [(0, 1)], 0.95).length_correlation is None


def test_no_pairs_are_said_to_be_none():
    assert share([], 0.95).value is None
    assert str(share([], 0.95)) == "no such pairs"
    assert held_out([], [], [], [], 0.95).accuracy.pairs == 0


def test_accuracy_is_of_what_the_loss_compares_and_correlation_of_log_probabilities():
    found = held_out([2.0, 1.0, 0.0], [-1.0, -2.0, -3.0], [3, 2, 1], [(0, 1), (2, 1)], 0.95)
    assert found.accuracy.value == 0.5
    assert found.length_correlation == pytest.approx(1)
