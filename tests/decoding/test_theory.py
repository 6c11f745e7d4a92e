from itertools import product

import numpy as np
import pytest
import torch

from pipeline.decoding.guidance import guided_logps, kl_divergence
from pipeline.training.losses import arm_loss

V, T = 4, 3
SEQUENCES = list(product(range(V), repeat=T))
PREFIXES = [prefix for length in range(T) for prefix in product(range(V), repeat=length)]
PLACES = {prefix: place for place, prefix in enumerate(PREFIXES)}
STEPS = torch.tensor([[PLACES[sequence[:t]] for t in range(T)] for sequence in SEQUENCES])
TOKENS = torch.tensor(SEQUENCES)


def sequence_logps(tables):
    """log π(y) of all sequences from next-token log-probabilities per prefix."""
    return tables[STEPS, TOKENS].sum(-1)


def conditionals(logps_S):
    """Next-token log-probabilities per prefix of a law over sequences."""
    table = torch.empty(len(PREFIXES), V, dtype=torch.float64)
    for prefix, token in product(PREFIXES, range(V)):
        starts = [sequence[: len(prefix) + 1] == (*prefix, token) for sequence in SEQUENCES]
        table[PLACES[prefix], token] = torch.logsumexp(logps_S[starts], 0)
    return torch.log_softmax(table, -1)


def decoded(base, arm, alpha):
    """The law of sequences that the decoding rule samples, token by token."""
    rows, ones = torch.arange(len(base)), torch.ones(len(base), dtype=torch.float64)
    return sequence_logps(guided_logps(base, [(rows, alpha * ones, arm)], ones))


def loss_optimal_arm(reward_S, beta_r):
    """The ARM that minimises the population loss over pairs labelled by Bradley and Terry."""
    theta = torch.zeros(len(PREFIXES), V, dtype=torch.float64, requires_grad=True)
    first, second = torch.combinations(torch.arange(len(SEQUENCES))).T
    preferred = torch.sigmoid(reward_S[first] - reward_S[second])
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=150, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        found = sequence_logps(torch.log_softmax(theta, -1))
        one, other = found[first], found[second]
        loss = (preferred * arm_loss(one, other, beta_r) + (1 - preferred) * arm_loss(other, one, beta_r)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.log_softmax(theta.detach(), -1)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_rule_reaches_the_optimal_policy_with_the_right_arm_but_not_with_the_one_the_loss_prefers(beta):
    generator = torch.Generator().manual_seed(round(beta * 10))
    base = torch.log_softmax(torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64), -1)
    reward = torch.randn(len(SEQUENCES), generator=generator, dtype=torch.float64)
    optimal = torch.log_softmax(sequence_logps(base) + reward / beta, -1)
    assert torch.allclose(sequence_logps(conditionals(optimal)), optimal, atol=1e-12)

    right = torch.log_softmax(beta * (conditionals(optimal) - base), -1)
    reached = kl_divergence(optimal, decoded(base, right, 1 / beta)).item()

    trained = loss_optimal_arm(reward, beta_r=1.0)  # so that log π_r is the reward, and its weight 1 / β
    assert torch.allclose(sequence_logps(trained), torch.log_softmax(reward, -1), atol=1e-4)
    missed = kl_divergence(optimal, decoded(base, trained, 1 / beta)).item()
    nearest = min(
        kl_divergence(optimal, decoded(base, trained, alpha)).item() for alpha in np.linspace(0, 5 / beta, 101)
    )

    print(f"β = {beta}: KL to π* is {reached:.1e} with the right ARM, {missed:.3f} with the trained one", end="")
    print(f" ({nearest:.3f} at its best α)")
    assert abs(reached) <= 1e-10
    assert missed > 0.01
    assert nearest > 0.01


def test_the_arm_the_loss_prefers_scores_whole_sequences_like_the_reward():
    reward = torch.randn(len(SEQUENCES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = 0.5 * sequence_logps(loss_optimal_arm(reward, beta_r=0.5))
    assert torch.allclose(found - found.mean(), reward - reward.mean(), atol=1e-4)
