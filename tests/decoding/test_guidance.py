import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, logsumexp
from scipy.stats import chisquare, kstest
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.data.files import digest
from pipeline.decoding.guidance import cut, draw, guided_logps, kl_divergence, normalised, random_stream, truncate

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
LOGITS = st.builds(
    lambda seed, scale: np.random.default_rng(seed).normal(0, scale, (3, 5)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 1.0, 10.0]),
)
ALPHAS = arrays(np.float64, 3, elements=st.floats(0, 3))
TEMPERATURES = arrays(np.float64, 3, elements=st.floats(0.1, 3))
ALL = torch.arange(3)
ONE = torch.ones(3, dtype=torch.float64)
LAST = 0.9999999999999999
EXTREMES = torch.tensor([0.0, LAST], dtype=torch.float64)


def logps(values):
    return torch.log_softmax(torch.from_numpy(np.asarray(values, dtype=np.float64)), -1)


def close(one, two, tolerance=1e-9):
    return torch.allclose(one, two, rtol=0, atol=tolerance)


@QUICK
@given(logits=LOGITS, padding=st.floats(-1e4, 1e4), pads=st.integers(0, 3))
def test_padding_beyond_the_vocabulary_takes_no_mass(logits, padding, pads):
    padded = torch.from_numpy(np.hstack([logits, np.full((3, pads), padding)]))
    found = guided_logps(cut(padded, 5), [], ONE)
    assert found.shape == (3, 5)
    assert close(found, torch.from_numpy(log_softmax(logits, axis=-1)))
    assert close(found.exp().sum(-1), ONE)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_laws_are_at_least_float32(given_dtype, dtype):
    logits = torch.tensor([[1.0, 2.0, 50.0]], dtype=given_dtype)
    heat = torch.ones(1, dtype=dtype)
    arm = (torch.tensor([0]), 0.3 * heat, logits[:, :2] / 3)
    wanted = torch.log_softmax(logits[:, :2].double() + 0.3 * (logits[:, :2] / 3).double(), -1)
    for found in (normalised(cut(logits, 2)), guided_logps(cut(logits, 2), [arm], heat)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.exp().sum(-1), heat)
    assert torch.allclose(guided_logps(cut(logits, 2), [arm], heat).double(), wanted, atol=1e-6)
    assert logits.tolist() == [[1.0, 2.0, 50.0]]


@QUICK
@given(base=LOGITS, arm=LOGITS)
def test_an_arm_of_weight_zero_leaves_the_base(base, arm):
    assert close(guided_logps(logps(base), [(ALL, 0 * ONE, logps(arm))], ONE), logps(base))


@QUICK
@given(base=LOGITS)
def test_no_arm_at_temperature_one_is_the_base(base):
    assert close(guided_logps(logps(base), [], ONE), logps(base))


@QUICK
@given(base=LOGITS, alpha=ALPHAS)
def test_a_uniform_arm_leaves_the_base(base, alpha):
    assert close(guided_logps(logps(base), [(ALL, torch.from_numpy(alpha), logps(np.zeros((3, 5))))], ONE), logps(base))


@QUICK
@given(base=LOGITS)
def test_the_base_as_its_own_arm_is_the_base_at_half_the_temperature(base):
    assert close(guided_logps(logps(base), [(ALL, ONE, logps(base))], ONE), guided_logps(logps(base), [], ONE / 2))


@QUICK
@given(base=LOGITS, one=LOGITS, two=LOGITS, alpha=ALPHAS, temperature=TEMPERATURES)
def test_a_further_arm_of_weight_zero_changes_nothing(base, one, two, alpha, temperature):
    first, heat = (ALL, torch.from_numpy(alpha), logps(one)), torch.from_numpy(temperature)
    alone, joined = (guided_logps(logps(base), arms, heat) for arms in ([first], [first, (ALL, 0 * ONE, logps(two))]))
    assert close(alone, joined)


@QUICK
@given(base=LOGITS, one=LOGITS, two=LOGITS, alpha=ALPHAS)
def test_the_order_of_arms_does_not_matter(base, one, two, alpha):
    arms = [(ALL, torch.from_numpy(alpha), logps(one)), (ALL, ONE, logps(two))]
    assert close(guided_logps(logps(base), arms, ONE), guided_logps(logps(base), arms[::-1], ONE))


@QUICK
@given(base=LOGITS, arm=LOGITS, alpha=ALPHAS, temperature=TEMPERATURES, shift=st.floats(-50, 50))
def test_constants_added_to_base_or_arm_change_nothing(base, arm, alpha, temperature, shift):
    weights, heat = torch.from_numpy(alpha), torch.from_numpy(temperature)
    plain = guided_logps(logps(base), [(ALL, weights, logps(arm))], heat)
    assert close(guided_logps(logps(base) + shift, [(ALL, weights, logps(arm) - shift)], heat), plain)


@QUICK
@given(
    base=LOGITS, one=LOGITS, two=LOGITS, alphas=arrays(np.float64, (2, 3), elements=st.floats(0, 3)), heat=TEMPERATURES
)
def test_the_rule_is_that_of_a_plain_loop(base, one, two, alphas, heat):
    arms = [(ALL, torch.from_numpy(alpha), logps(arm)) for alpha, arm in zip(alphas, (one, two), strict=True)]
    found = guided_logps(logps(base), arms, torch.from_numpy(heat)).numpy()
    tables = [log_softmax(logits, axis=-1) for logits in (base, one, two)]
    for row in range(3):
        total = [
            (tables[0][row, v] + alphas[0, row] * tables[1][row, v] + alphas[1, row] * tables[2][row, v]) / heat[row]
            for v in range(5)
        ]
        assert np.allclose(found[row], np.array(total) - logsumexp(total), rtol=0, atol=1e-9)


@QUICK
@given(base=LOGITS, arm=LOGITS)
def test_an_arm_guides_only_its_own_rows_and_the_base_is_not_written_to(base, arm):
    before = logps(base)
    found = guided_logps(before, [(torch.tensor([2, 0]), 2 * ONE[:2], logps(arm)[[2, 0]])], ONE)
    assert torch.equal(before, logps(base))
    assert close(found[1], before[1])
    assert close(found[[0, 2]], torch.log_softmax(before + 2 * logps(arm), -1)[[0, 2]])


@QUICK
@given(one=LOGITS, two=LOGITS)
def test_kl_is_never_negative_and_zero_for_equal_laws(one, two):
    assert (kl_divergence(logps(one), logps(two)) >= -1e-12).all()
    assert kl_divergence(logps(one), logps(one)).tolist() == [0.0] * 3


def test_kl_of_a_law_that_never_draws_some_tokens_leaves_them_out():
    law = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    assert kl_divergence(law, uniform).item() == pytest.approx(np.log(1.5))
    assert kl_divergence(uniform, law).item() > 1e20
    assert kl_divergence(torch.full_like(law, torch.nan), uniform).isnan()


LAW = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 2, (4, 40)))
OPTIONS = st.tuples(
    st.integers(0, 45), st.sampled_from([1.0, 0.999, 0.7, 0.2, 0.01]), st.sampled_from([0.0, 0.05, 0.5])
)


@QUICK
@given(logits=LAW, options=st.lists(OPTIONS, min_size=4, max_size=4))
def test_truncation_is_that_of_hugging_face(logits, options):
    law = logps(logits)
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*options, strict=True))
    found = truncate(law, top_k, top_p.double(), min_p.double())
    for row, (k, p, least) in enumerate(options):
        scores = law[[row]]
        warpers = [TopKLogitsWarper(k)] if k else []
        warpers += [TopPLogitsWarper(p)] if p < 1 else []
        warpers += [MinPLogitsWarper(least)] if least else []
        for warper in warpers:
            scores = warper(None, scores)
        assert close(found[[row]].exp(), torch.softmax(scores, -1))


@QUICK
@given(logits=LAW, k=st.integers(1, 39))
def test_exactly_k_tokens_stay_even_where_all_are_equally_likely(logits, k):
    for law in (logps(logits), logps(np.zeros((4, 40)))):
        found = truncate(law, torch.full((4,), k), ONE.new_ones(4), ONE.new_zeros(4))
        assert (found > -torch.inf).sum(-1).tolist() == [k] * 4
        assert close(found.exp().sum(-1), ONE.new_ones(4))


@QUICK
@given(logits=LAW)
def test_options_that_are_off_change_nothing(logits):
    law = logps(logits)
    assert close(truncate(law, torch.zeros(4, dtype=torch.long), ONE.new_ones(4), ONE.new_zeros(4)), law)


def test_kl_by_hand():
    found = kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    assert found.item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


@pytest.mark.parametrize("vocabulary", [7, 256, 257, 500, 1000])
def test_draws_follow_the_law(vocabulary):
    dice = np.random.default_rng(vocabulary)
    law = logps(dice.normal(0, 0.5, (1, vocabulary)))
    uniforms = torch.from_numpy(random_stream(digest(["draws", vocabulary]), 40_000))
    tokens = torch.cat([draw(law.float().expand(len(part), -1), part) for part in uniforms.split(4000)])
    counts = np.bincount(tokens.numpy(), minlength=vocabulary)
    expected = law[0].exp().numpy() * len(uniforms)
    assert expected.min() > 5
    found = chisquare(counts, expected)
    print(f"40,000 draws from {vocabulary} tokens: chi-square p = {found.pvalue:.3f}")
    assert found.pvalue > 0.01


@QUICK
@given(
    logits=arrays(np.float64, st.integers(1, 700), elements=st.floats(-8, 8)),
    uniforms=arrays(np.float64, 8, elements=st.floats(0, LAST)),
)
def test_a_draw_inverts_the_cumulative_distribution(logits, uniforms):
    law = logps(logits[None])
    tokens = draw(law.expand(8, -1), torch.from_numpy(uniforms)).numpy()
    upper = law[0].exp().numpy().cumsum()
    lower = np.concatenate([[0.0], upper])
    assert (lower[tokens] <= uniforms + 1e-9).all()
    assert (uniforms <= upper[tokens] + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@QUICK
@given(data=st.data(), vocabulary=st.sampled_from([1, 2, 7, 255, 256, 257, 500, 513]))
def test_a_token_of_probability_zero_is_never_drawn(dtype, data, vocabulary):
    allowed = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1, max_size=4))
    scores = data.draw(st.lists(st.floats(-60, 0), min_size=len(allowed), max_size=len(allowed)))
    logits = torch.full((1, vocabulary), -torch.inf, dtype=dtype)
    logits[0, sorted(allowed)] = torch.tensor(scores, dtype=dtype)
    drawn = data.draw(arrays(np.float64, 6, elements=st.floats(0, LAST)))
    uniforms = torch.cat([EXTREMES, torch.from_numpy(drawn)])
    tokens = draw(torch.log_softmax(logits, -1).expand(len(uniforms), -1), uniforms)
    assert set(tokens.tolist()) <= allowed


@pytest.mark.parametrize("vocabulary", [2, 7, 256, 257, 500, 512])
def test_the_extreme_uniforms_draw_the_first_and_the_last_token(vocabulary):
    law = logps(np.zeros((2, vocabulary)))
    assert draw(law, EXTREMES).tolist() == draw(law.float(), EXTREMES).tolist() == [0, vocabulary - 1]
    law[:, 0] = law[:, -1] = -torch.inf
    if vocabulary > 2:
        assert draw(torch.log_softmax(law, -1), EXTREMES).tolist() == [1, vocabulary - 2]


@QUICK
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 12), vocabulary=st.sampled_from([7, 256, 500]))
def test_a_draw_does_not_depend_on_the_rows_around_it(seed, rows, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    law = torch.log_softmax(3 * torch.randn(rows, vocabulary, generator=generator), -1)
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    together = draw(law, uniforms).tolist()
    assert together == [draw(law[[row]], uniforms[[row]]).item() for row in range(rows)]
    order = torch.randperm(rows, generator=generator)
    assert draw(law[order], uniforms[order]).tolist() == [together[row] for row in order]


def test_a_stream_is_fixed_by_its_key_and_a_longer_one_begins_like_it():
    stream = random_stream(digest("a"), 50)
    assert stream.tolist() == random_stream(digest("a"), 50).tolist() == random_stream(digest("a"), 80)[:50].tolist()
    assert not set(stream) & set(random_stream(digest("b"), 50))


def test_keys_that_differ_in_one_digit_make_unrelated_streams():
    streams = np.array([random_stream(f"{key:032x}", 2000) for key in (0, 1, 1 << 64, 1 << 127)])
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 0.08


def test_streams_are_uniform_within_and_across_keys():
    within = random_stream(digest("within"), 20_000)
    across = [random_stream(digest(["across", number]), 1)[0] for number in range(4000)]
    assert kstest(within, "uniform").pvalue > 0.01
    assert kstest(across, "uniform").pvalue > 0.01
    assert 0 <= within.min() < within.max() < 1
