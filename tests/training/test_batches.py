import copy
import json
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.models.prompting import Prompter
from pipeline.training.batches import PromptGroup, ResumableLoader, StepBatches, collate, tokenise

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


def pair(prompt, good, bad):
    return {"id": f"{prompt}/{good}", "prompt": prompt, "chosen": good, "rejected": bad}


@pytest.fixture
def groups(prompter):
    pairs = [
        pair("Describe a rainy Monday in detail.", "good great love", "bad"),
        pair("Why?", "happy", "sad and terrible") | {"rejected_ended": False},
        pair("Describe a rainy Monday in detail.", "nice", "good great love"),
        pair("Why?", "happy", "awful"),
    ]
    return tokenise(pairs, prompter, 256, "pairs.jsonl").groups


def test_a_prompt_and_each_of_its_responses_are_tokenised_once(groups, prompter):
    assert [len(group.responses) for group in groups] == [3, 3]
    assert [group.pairs for group in groups] == [[(0, 1), (2, 0)], [(0, 1), (0, 2)]]
    assert groups[0].prompt == prompter.prompt_ids("Describe a rainy Monday in detail.")
    texts = (("happy", True), ("sad and terrible", False), ("awful", True))
    assert groups[1].responses == [prompter.response_ids("Why?", *text) for text in texts]
    assert [response[-1] == prompter.eos for response in groups[1].responses] == [True, False, True]


def test_collate_predicts_every_response_token_once_from_the_column_before_it(groups):
    batch, responses = collate(groups, pad=0), [response for group in groups for response in group.responses]
    found = [[] for _ in responses]
    last = {}
    targets = torch.stack([batch[key] for key in ("row", "column", "label", "response")], 1).tolist()
    for row, column, label, response in targets:
        found[response].append(label)
        place = response - sum(len(group.responses) for group in groups[:row]) + 1
        if response not in last:
            assert column == len(groups[row].prompt) - 1
            assert int(batch["ids"][row, column]) == groups[row].prompt[-1]
            assert int(batch["segments"][row, column]) == 0
        else:
            assert int(batch["ids"][row, column]) == last[response]
            assert int(batch["segments"][row, column]) == place
        own = [at for at in range(batch["ids"].shape[1]) if batch["segments"][row, at] == place]
        at = own[len(found[response]) - 1]
        assert int(batch["ids"][row, at]) == label
        assert int(batch["positions"][row, at]) == int(batch["positions"][row, column]) + 1
        assert at == column + 1 or response not in last
        last[response] = label
    assert found == responses
    assert [(int(a), int(b)) for a, b in zip(batch["chosen"], batch["rejected"], strict=True)] == [
        (0, 1), (2, 0), (3, 4), (3, 5),
    ]  # fmt: skip


def test_groups_of_one_prompt_share_its_number(prompter):
    """Nine responses do not share a row, and their pairs are of one prompt all the same."""
    rows = [pair("Why?", f"good {number}", f"bad {number}") for number in range(6)] + [pair("How?", "yes", "no")]
    groups = tokenise(rows, prompter, 256, "pairs.jsonl").groups
    assert [group.number for group in groups] == [0, 0, 1]
    assert collate(groups, pad=0)["prompt"].tolist() == [0] * 6 + [1]


def test_collate_pads_behind_the_responses(groups):
    batch = collate(groups, pad=0)
    for row, group in enumerate(groups):
        segments = batch["segments"][row].tolist()
        content = [at for at, segment in enumerate(segments) if segment >= 0]
        assert content == list(range(len(group)))
        assert batch["ids"][row, content].tolist() == [*group.prompt, *chain(*group.responses)]
        outside = [at for at, segment in enumerate(segments) if segment < 0]
        assert set(batch["ids"][row, outside].tolist()) <= {0}
        for number, response in enumerate(group.responses, 1):
            positions = batch["positions"][row, batch["segments"][row] == number].tolist()
            assert positions == list(range(len(group.prompt), len(group.prompt) + len(response)))


TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=5)
GROUPS = st.builds(PromptGroup, TOKENS, st.lists(TOKENS, min_size=2, max_size=4), st.just([(0, 1), (1, 0)]))


@QUICK
@given(groups=st.lists(GROUPS, min_size=1, max_size=4))
def test_collate_holds_every_token_of_any_groups(groups):
    batch = collate(groups, pad=0)
    responses = [response for group in groups for response in group.responses]
    assert batch["label"].tolist() == [*chain(*responses)]
    assert torch.bincount(batch["response"]).tolist() == [len(response) for response in responses]
    assert int((batch["segments"] >= 0).sum()) == sum(len(group.prompt) for group in groups) + len(batch["label"])
    assert 0 <= int(batch["column"].min()) <= int(batch["column"].max()) < batch["ids"].shape[1]


def test_the_reference_goes_with_its_responses(groups):
    assert "reference" not in collate(groups, 0)
    for number, group in enumerate(groups):
        group.reference = [-1.0 - number, -2.0 - number, -3.0 - number]
    assert collate(groups, 0)["reference"].tolist() == [-1, -2, -3, -2, -3, -4]


def test_a_prompt_with_many_responses_is_split_into_groups_of_at_most_eight(prompter):
    pairs = [pair("Why?", f"good {n}", f"bad {n}") for n in range(11)] + [pair("How?", "x", "y")]
    groups = tokenise(pairs, prompter, 256, "pairs.jsonl").groups
    assert [len(group.responses) for group in groups] == [8, 8, 6, 2]
    assert [len(group.pairs) for group in groups] == [4, 4, 3, 1]
    told = [[group.responses[good], group.responses[bad]] for group in groups for good, bad in group.pairs]
    assert told == [
        [prompter.response_ids(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in pairs
    ]


def test_a_group_of_seven_responses_takes_no_further_pair(prompter):
    pairs = [pair("Why?", "a", "b"), pair("Why?", "a", "c")] + [pair("Why?", f"x{n}", f"y{n}") for n in range(3)]
    assert [len(group.responses) for group in tokenise(pairs, prompter, 256, "pairs.jsonl").groups] == [7, 2]


def test_a_long_prompt_keeps_its_end_and_a_pair_that_cannot_fit_is_dropped_and_counted(prompter):
    rows = [pair("Describe a rainy Monday in detail.", "good", "bad bad"), pair("Why?", "good", "bad " * 20)]
    prompt = prompter.prompt_ids(rows[0]["prompt"])
    longest = max(len(prompter.response_ids(rows[0]["prompt"], rows[0][side])) for side in ("chosen", "rejected"))
    whole = tokenise(rows, prompter, 256, "pairs.jsonl")
    assert (whole.pairs, whole.truncated, whole.dropped) == (2, 0, 0)
    exact = tokenise(rows[:1], prompter, len(prompt) + longest, "pairs.jsonl")
    assert (exact.groups[0].prompt, exact.truncated) == (prompt, 0)
    cut = tokenise(rows, prompter, longest + 5, "pairs.jsonl")
    assert (cut.pairs, cut.truncated, cut.dropped) == (1, 1, 1)
    assert cut.groups[0].prompt == prompt[-5:]
    assert cut.groups[0].responses == whole.groups[0].responses
    with pytest.raises(UserError, match=r"pairs\.jsonl: no pair fits into 3 tokens: raise trainer\.max_length\."):
        tokenise(rows, prompter, 3, "pairs.jsonl")


def test_a_cut_prompt_keeps_its_beginning_of_sequence_token(prompter):
    row = pair("Describe a rainy Monday in detail.", "good", "bad")
    prompt = prompter.prompt_ids(row["prompt"])
    tokenizer = copy.deepcopy(prompter.tokenizer)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(prompt[0])
    longest = max(len(prompter.response_ids(row["prompt"], row[side])) for side in ("chosen", "rejected"))
    cut = tokenise([row], Prompter(tokenizer, prompter.template), longest + 5, "x")
    assert cut.groups[0].prompt == [prompt[0], *prompt[-4:]]


def epoch(batches, number):
    batches.set_epoch(number)
    return list(batches)


def of_lengths(lengths, pairs=1):
    return [PromptGroup([1] * length, [[2], [3]], [(0, 1)] * pairs) for length in lengths]


def some(count, seed=0):
    return of_lengths(torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@QUICK
@given(count=st.integers(1, 40), size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_every_epoch_is_a_permutation_in_steps(count, size, seed):
    batches = StepBatches(some(count), size, seed)
    served = epoch(batches, 3)
    assert sorted(chain(*(micro.places for micro in served))) == list(range(count))
    assert len(served) == len(batches) == -(-count // size)
    assert [micro.places for micro in served] == batches.steps()


@QUICK
@given(
    count=st.integers(1, 40), size=st.integers(1, 9), accumulate=st.integers(1, 4), world=st.integers(1, 4),
    pairs=st.lists(st.integers(1, 3), min_size=40, max_size=40),
)  # fmt: skip
def test_processes_and_micro_batches_share_the_same_steps_and_weigh_every_pair_alike(
    count, size, accumulate, world, pairs
):
    groups = [PromptGroup([1] * (1 + place % 7), [[2], [3]], [(0, 1)] * pairs[place]) for place in range(count)]
    ranks = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pipeline.training.batches.is_initialized", lambda: True)
            patched.setattr("pipeline.training.batches.get_rank", lambda rank=rank: rank)
            ranks.append(epoch(StepBatches(groups, size, 5, accumulate, world), 2))
    whole = StepBatches(groups, size, 5)
    whole.set_epoch(2)
    assert {len(rank) for rank in ranks} == {len(whole) * accumulate}
    for number, step in enumerate(whole.steps()):
        micros = [micro for rank in ranks for micro in rank[number * accumulate : (number + 1) * accumulate]]
        counted = [micro for micro in micros if micro.weight > 0]
        assert sorted(chain(*(micro.places for micro in counted))) == sorted(step)
        total = sum(len(groups[place].pairs) for place in step)
        # Lightning divides by `accumulate` and DDP by the number of processes: what is left is the mean over pairs.
        assert all(micro.weight / (accumulate * world) == pytest.approx(1 / total) for micro in counted)


def test_steps_hold_prompts_of_like_length():
    groups = some(400)
    steps = StepBatches(groups, 8, 0).steps()
    tokens = sum(map(len, groups))
    computed = sum(len(step) * max(len(groups[place]) for place in step) for step in steps)
    in_any_order = sum(8 * max(map(len, groups[first : first + 8])) for first in range(0, 400, 8))
    assert 1 - tokens / computed < 0.06 and 1 - tokens / in_any_order > 0.3
    first = [len(groups[step[0]]) for step in steps]
    assert first != sorted(first), "the steps themselves are shuffled"


def test_epochs_differ_and_a_seed_fixes_them():
    batches = StepBatches(some(50), 4, 0)
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert first != second
    assert epoch(batches, 0) == first == epoch(StepBatches(some(50), 4, 0), 0)
    assert epoch(StepBatches(some(50), 4, 1), 0) != first


def loader(seed=0):
    groups = some(23)
    return ResumableLoader(groups, StepBatches(groups, 4, seed), 0)


def served(loaded):
    return [{name: value.tolist() for name, value in batch.items()} for batch in loaded]


@pytest.mark.parametrize("seen", range(7))
def test_a_loader_resumes_in_the_middle_of_an_epoch_and_goes_on_into_the_next(seen):
    whole = loader()
    whole.batches.set_epoch(2)
    expected = served(whole)
    killed = loader()
    killed.batches.set_epoch(2)
    iterator = iter(killed)
    before = served(next(iterator) for _ in range(min(seen, 6)))
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.batches.set_epoch(2 if seen < 6 else 3)
    if seen < 6:
        assert before + served(resumed) == expected
        resumed.batches.set_epoch(3)
    whole.batches.set_epoch(3)
    assert served(resumed) == served(whole) != expected
