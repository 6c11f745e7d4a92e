import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.config.methods import Comparison, GenArm
from pipeline.config.points import Mix
from pipeline.config.schema import Arm, Rival, Tune
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.fused_lora import read_adapter
from pipeline.generation.methods import Place, genarm, mod, morl, soups
from pipeline.generation.methods.args import Args
from pipeline.generation.methods.best_of_n import BestOfN
from pipeline.generation.methods.cards import Cards
from pipeline.generation.methods.controlled_decoding import ControlledDecoding
from pipeline.generation.methods.lookahead_cache import LookaheadCache, TextReward
from pipeline.generation.methods.transfer_q import TransferQ
from pipeline.models.identity import folder_identity
from pipeline.models.loading import Source, load_model
from pipeline.models.prefix_scorer import PrefixHead, PrefixValues
from pipeline.training.arm import trainable
from pipeline.training.reward_model import RewardModel

CPU = torch.device("cpu")
PROMPTS = ["Describe a rainy Monday.", "Why?", "Tell me about tea.", "Any tips for a long flight?"]


@pytest.fixture(scope="module")
def rewards(tiny, tmp_path_factory):
    """Two reward models of the tiny base with random adapters, as their folders are read."""
    found = {}
    for seed, name in enumerate(("warm", "short")):
        model = trainable(load_model(tiny, torch.float32, CPU), Arm("tiny", targets="q_proj,v_proj"), seed, CPU)
        reward, generator = RewardModel(model, torch.float32), torch.Generator().manual_seed(seed)
        for weight in reward.parameters():
            if weight.requires_grad:
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        folder = tmp_path_factory.mktemp(name)
        reward.write(folder, "tiny", mean=0.1, std=0.5)
        found[name] = TextReward.load(Source(tiny, dtype="float32"), folder, CPU)
    return found


def requests(weights, count=6, tokens=8):
    return [Request(PROMPTS[number % 4], weights, max_new_tokens=tokens, sample=number // 4) for number in range(count)]


def answers(decoder, asked):
    found = dict(decoder.generate(asked))
    assert sorted(found) == [*range(len(asked))]
    return [found[place] for place in range(len(asked))]


def reward_of(rewards, weights, ids):
    """Σ_i w_i r_i of a text, one plain forward each."""
    total = 0.0
    for name, weight in weights.items():
        hidden = rewards[name].backbone(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
        total += weight * float((rewards[name].score(hidden)[0, 0] - 0.1) / 0.5)
    return total


@torch.no_grad()
def test_what_is_read_ahead_is_what_is_read_alone(base, prompter):
    prompts = [prompter.prompt_ids(prompt) for prompt in PROMPTS[:2]]
    reading = LookaheadCache(base.base_model, prompts, prompter.eos)
    tried = reading.tried(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    fork = reading.forked(2)
    again = fork.read(torch.tensor([[5, 11], [6, 11], [8, 12], [9, 12]]))
    reading.read(torch.tensor([[7], [10]]))
    read = reading.read(torch.tensor([[11], [12]]))

    def alone(ids):
        return base.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]

    for row, tokens in enumerate(([5, 6, 7], [8, 9, 10])):
        for place, token in enumerate(tokens):
            torch.testing.assert_close(tried[row, place], alone([*prompts[row], token])[-1], rtol=1e-4, atol=1e-4)
    for row, tokens in enumerate(([7, 11], [10, 12])):
        torch.testing.assert_close(read[row, 0], alone([*prompts[row], *tokens])[-1], rtol=1e-4, atol=1e-4)
    for row, tokens in enumerate(([5, 11], [6, 11], [8, 12], [9, 12])):
        torch.testing.assert_close(again[row], alone([*prompts[row // 2], *tokens])[-2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("horizon", [0, 2])
def test_the_law_of_a_search_is_that_of_an_independent_loop(base, prompter, rewards, horizon):
    """Every token's law by brute force: each candidate's text, rolled out and scored from the start."""
    weights, scale = {"warm": 0.7, "short": 0.3}, 2.0
    common = base, prompter, rewards, 4
    decoder = TransferQ(*common, 3, scale, horizon) if horizon else Args(*common, 3, scale)
    asked = requests(weights, 3, 4)
    for request, found in zip(asked, answers(decoder, asked), strict=True):
        ids, logp, kl = prompter.prompt_ids(request.prompt), 0.0, 0.0
        for token in found.tokens:
            base_V = base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            values, candidates = base_V.topk(3)
            worth = []
            for candidate in candidates.tolist():
                text = [*ids, candidate]
                for _ in range(horizon):
                    if text[-1] in (prompter.eos,):
                        break
                    text.append(int(base(torch.tensor([text])).logits[0, -1].argmax()))
                worth.append(scale * reward_of(rewards, weights, text))
            law = (values + torch.tensor(worth)).log_softmax(-1)
            logp += float(law[candidates.tolist().index(token)])
            kl += float((law.exp() * (law - values)).sum())
            ids = [*ids, token]
        assert found.logp == pytest.approx(logp, abs=2e-3) and found.kl == pytest.approx(kl, abs=2e-3)
        assert found.forwards == len(found.tokens) * (1 + 3 * horizon + 2 * (3 * (horizon + 1) + 1))


def test_transfer_q_without_roll_outs_is_args(base, prompter, rewards):
    asked = requests({"warm": 1.0})
    args = answers(Args(base, prompter, rewards, 4, 4, 1.5), asked)
    rolled = answers(TransferQ(base, prompter, rewards, 4, 4, 1.5, 0), asked)
    assert [one.tokens for one in args] == [one.tokens for one in rolled]


def test_rewards_that_do_not_count_leave_the_base(base, prompter, rewards):
    for one in answers(Args(base, prompter, rewards, 4, prompter.vocab_size, 1.0), requests({}, 4)):
        assert one.kl == pytest.approx(0, abs=1e-5) and one.logp == pytest.approx(one.logp_base, abs=1e-4)


@torch.no_grad()
def test_cards_sums_the_base_over_what_it_kept(base, prompter, rewards):
    asked = requests({"warm": 1.0}, 5)
    for request, found in zip(
        asked, answers(Cards(base, prompter, rewards, 4, 3.0, 4, 3, 1.0, 0.3), asked), strict=True
    ):
        ids, total = prompter.prompt_ids(request.prompt), 0.0
        for token in found.tokens:
            total += float(base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids = [*ids, token]
        assert found.logp_base == pytest.approx(total, abs=1e-3) and math.isnan(found.kl)
        assert 1 <= len(found.tokens) <= 8
        assert found.finish == ("eos" if found.tokens[-1] == prompter.eos else "length")


@torch.no_grad()
def test_the_cost_of_a_row_is_what_its_models_compute_behind_its_prompt(base, prompter, rewards):
    """Counted at the models themselves: one row alone, so that nothing is computed for others or padded."""
    (asked,) = requests({"warm": 1.0}, 1)
    prompt, positions = len(prompter.prompt_ids(asked.prompt)), []

    def count(_, args, kwargs):
        positions.append(kwargs["input_ids"].shape)

    hooks = [
        model.register_forward_pre_hook(count, with_kwargs=True)
        for model in (base.base_model, rewards["warm"].backbone)
    ]
    decoders = {
        "cards": Cards(base, prompter, rewards, 1, 3.0, 4, 3, 1.0, 0.3),
        "args": Args(base, prompter, rewards, 1, 3, 2.0),
        "transfer_q": TransferQ(base, prompter, rewards, 1, 3, 2.0, 2),
    }
    try:
        for name, decoder in decoders.items():
            positions.clear()
            (found,) = answers(decoder, [asked])
            behind = sum(rows * length - (prompt if length >= prompt else 0) for rows, length in positions)
            # The last token of a row, or of a segment, is drawn and not read again by what drew it.
            assert behind <= found.forwards <= behind + len(positions), name
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_the_cost_of_a_row_does_not_depend_on_the_rows_beside_it(base, prompter, rewards):
    one, both = requests({"warm": 1.0}, 1), requests({"warm": 1.0, "short": 1.0}, 1)
    for decoder in (Args(base, prompter, rewards, 4, 3, 2.0), Cards(base, prompter, rewards, 4, 3.0, 4, 3, 1.0, 0.3)):
        alone, beside = answers(decoder, one)[0], answers(decoder, [*one, *both])[0]
        assert alone.tokens == beside.tokens and alone.forwards == beside.forwards


@torch.no_grad()
def test_cards_that_ask_for_more_earn_more(base, prompter, rewards):
    asked = requests({"warm": 1.0}, 24)

    def earned(target):
        decoder = Cards(base, prompter, rewards, 24, 2.0, 4, 6, target, 0.05)
        texts = [
            [*prompter.prompt_ids(a.prompt), *f.tokens] for a, f in zip(asked, answers(decoder, asked), strict=True)
        ]
        return sum(reward_of(rewards, {"warm": 1.0}, text) for text in texts) / len(texts)

    assert earned(50.0) > earned(-50.0) + 0.2


@torch.no_grad()
def test_the_best_of_n_is_the_one_that_reward_models_choose(base, prompter, rewards):
    plain, asked = GuidedDecoder(Backbone(base, prompter)), requests({"warm": 1.0, "short": 0.5}, 8)
    asked += [dataclasses.replace(request, weights={"short": 1.0}) for request in asked]
    best = answers(BestOfN(plain, prompter, rewards, 3), asked)
    for request, found in zip(asked, best, strict=True):
        mine = [dataclasses.replace(request, weights={}, sample=3 * request.sample + number) for number in range(3)]
        drawn = [one for _, one in sorted(plain.generate(mine))]
        ids = prompter.prompt_ids(request.prompt)
        worth = [reward_of(rewards, request.weights, [*ids, *one.tokens]) for one in drawn]
        assert found.tokens == drawn[worth.index(max(worth))].tokens
        assert found.kl == pytest.approx(math.log(3) - 2 / 3)
        assert found.forwards == sum(len(one.tokens) for one in drawn) * (1 + len(request.weights))


def test_searches_refuse_what_they_do_not_do(base, prompter, rewards):
    decoder = Args(base, prompter, rewards, 4, 4, 1.0)
    for fault in ({"temperature": 0.5}, {"stop": ("x",)}, {"top_p": 0.9}):
        with pytest.raises(UserError, match="sample at temperature 1"):
            decoder.plan([Request("Why?", {"warm": 1.0}, **fault)])
    with pytest.raises(UserError, match="no reward model for cold"):
        decoder.plan([Request("Why?", {"cold": 1.0})])


@given(st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=20)
def test_a_soup_of_products_is_the_average_update(share):
    generator = torch.Generator().manual_seed(1)
    factors = [
        (torch.randn(2, 5, generator=generator).double(), torch.randn(4, 2, generator=generator).double())
        for _ in range(2)
    ]
    weights = [share, 1 - share]
    wanted = sum(weight * b @ a for (a, b), weight in zip(factors, weights, strict=True))
    a, b = soups.stacked(factors, weights)
    torch.testing.assert_close(b @ a, wanted)
    a, b = soups.averaged(factors, weights)
    assert not torch.allclose(b @ a, wanted, atol=1e-3), "averaged factors are something else"


@pytest.fixture
def place(smoke_params, workspace, arms):
    """A workspace in which two policies of the tiny base are trained, and one for an even mix."""
    rivals = {
        "positivity": Rival({"positivity": 1.0}), "conciseness": Rival({"conciseness": 1.0}),
        "even": Rival({"positivity": 0.5, "conciseness": 0.5}),
    }  # fmt: skip
    params = dataclasses.replace(smoke_params, tune=Tune(("tiny",), rivals))
    for name, folder in zip(rivals, ("one", "two", "three"), strict=True):
        target = workspace.rival("tiny", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(arms[folder])
    return Place(params, workspace, params.base)


def test_soups_are_adapters_that_average_updates(place, base):
    mix = Mix("mixed", {"positivity": 0.25, "conciseness": 0.75}, 1.0)
    law = soups.law(True, mix, place)
    assert law.weights == {"base": 0.0, "policy/soup-mixed": 1.0}
    merged = read_adapter(law.adapters["policy/soup-mixed"], base)
    apart = [read_adapter(place.rival(name), base) for name in ("positivity", "conciseness")]
    for name, update in merged.items():
        wanted = sum(
            share * (found[name].a_DR @ found[name].b_RO) for share, found in zip((0.25, 0.75), apart, strict=True)
        )
        torch.testing.assert_close(update.a_DR @ update.b_RO, wanted, rtol=1e-4, atol=1e-5)
    corner = soups.law(False, Mix("corner", {"positivity": 2.0}, 1.0), place)
    same = read_adapter(corner.adapters["policy/soup_factors-corner"], base)
    for name, update in apart[0].items():
        torch.testing.assert_close(update.b_RO, same[name].b_RO)


def test_adapters_made_of_others_are_apart_where_those_are(place, arms, tmp_path):
    """Two experiments that run at once share scratch/, and their rivals have the same names."""
    mix = Mix("mixed", {"positivity": 0.5, "conciseness": 0.5}, 1.0)
    other = Place(place.params, dataclasses.replace(place.workspace, models=tmp_path / "other"), place.base)
    for name, folder in zip(("positivity", "conciseness"), ("one", "one"), strict=True):
        target = other.workspace.rival("tiny", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(arms[folder])
    first, second = (soups.law(True, mix, one).adapters["policy/soup-mixed"] for one in (place, other))
    before = folder_identity(first)
    assert first != second and before != folder_identity(second)
    made = first.stat().st_mtime_ns
    again = soups.law(True, mix, place).adapters["policy/soup-mixed"]
    assert again == first and first.stat().st_mtime_ns == made and folder_identity(first) == before


def test_the_laws_by_lane(place, workspace):
    mix = Mix("mixed", {"positivity": 0.5, "conciseness": 0.5}, 0.5)
    assert mod.law(mix, place).weights == {"base": 0.5, "policy/positivity": 0.25, "policy/conciseness": 0.25}
    assert morl.law("dpo", mix, place).weights == {"base": 0.5, "policy/even": 0.5}
    assert morl.law("dpo", Mix("end", {"positivity": 3.0}, 1.0), place).weights == {
        "base": 0.0,
        "policy/positivity": 1.0,
    }
    with pytest.raises(UserError, match="no dpo policy is trained for the weights of point odd"):
        morl.law("dpo", Mix("odd", {"positivity": 0.9, "conciseness": 0.1}, 1.0), place)
    plain = genarm.law(GenArm(kind="genarm"), mix, place)
    assert plain.weights == {"positivity": 0.25, "conciseness": 0.25}
    assert set(plain.trained) == {workspace.arm("positivity"), workspace.arm("conciseness")}
    ratio = genarm.law(GenArm(kind="genarm", form="log_ratio"), mix, place)
    assert ratio.weights == {"positivity": 0.25, "conciseness": 0.25, "base": 0.5}
    tuned = genarm.law(GenArm(kind="genarm", arms="policies"), mix, place)
    assert tuned.weights == {"policy/positivity": 0.25, "policy/conciseness": 0.25}
    ratio = genarm.law(GenArm(kind="genarm", arms="policies", form="log_ratio"), mix, place)
    assert ratio.weights == mod.law(mix, place).weights, "which is MOD"


def test_a_comparison_names_its_base_and_its_measure(compose_params):
    params = compose_params("experiment=comparison")
    assert params.comparison.bases == (params.base,) and params.comparison.against in params.comparison.methods
    assert compose_params().comparison == Comparison()
    with pytest.raises(UserError, match=r"comparison\.against gen is no method: name one of genarm"):
        compose_params("experiment=comparison", "comparison.against=gen")
    with pytest.raises(
        UserError, match=r"comparison\.methods\.args\.topk: did you mean comparison\.methods\.args\.top_k"
    ):
        compose_params("experiment=comparison", "+comparison.methods.args.topk=3")
    one = compose_params("experiment=comparison", "methods@comparison.methods=[mod,genarm]")
    assert [*one.comparison.methods] == ["mod", "genarm"]


@pytest.mark.parametrize("logarithm", [True, False])
@torch.no_grad()
def test_the_law_of_controlled_decoding_is_that_of_an_independent_loop_and_costs_no_other_forward(
    base, prompter, logarithm
):
    """Every token's law from the formula of the head, each text read from the start."""
    heads, generator = {}, torch.Generator().manual_seed(3)
    for name in ("warm", "short"):
        heads[name] = PrefixHead(base.config.hidden_size)
        for weight in heads[name].parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    values = {name: PrefixValues(head, base) for name, head in heads.items()}
    weights, scale = {"warm": 0.7, "short": -0.4}, 3.0
    asked = requests(weights, 5, 5)
    decoder = ControlledDecoding(base, prompter, values, 4, scale, logarithm)
    for request, found in zip(asked, answers(decoder, asked), strict=True):
        ids, logp, kl = prompter.prompt_ids(request.prompt), 0.0, 0.0
        for token in found.tokens:
            hidden = base.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            base_V = base.lm_head(hidden).log_softmax(-1)
            law_V = base_V.clone()
            for name, weight in weights.items():
                head = heads[name]
                state = torch.nn.functional.gelu(head.state(hidden))
                odds_V = head.token(base.lm_head.weight) @ state + head.prefix(hidden)
                law_V += scale * weight * (odds_V.sigmoid().log() if logarithm else odds_V.sigmoid())
            law_V = law_V.log_softmax(-1)
            logp, kl = logp + float(law_V[token]), kl + float((law_V.exp() * (law_V - base_V)).sum())
            ids = [*ids, token]
        assert found.logp == pytest.approx(logp, abs=2e-3) and found.kl == pytest.approx(kl, abs=2e-3)
        assert found.kl > 0.01 and found.forwards == len(found.tokens)
