import json
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import UserError
from pipeline.pairs import EpochBatches, PromptGroup, ResumableLoader, collate, tokenise

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
    return tokenise(pairs, prompter, 256, "pairs.jsonl")


def test_a_prompt_and_each_of_its_responses_are_tokenised_once(groups, prompter):
    assert [len(group.responses) for group in groups] == [3, 3]
    assert [group.pairs for group in groups] == [[(0, 1), (2, 0)], [(0, 1), (0, 2)]]
    assert groups[0].prompt == prompter.prompt_ids("Describe a rainy Monday in detail.")
    texts = (("happy", True), ("sad and terrible", False), ("awful", True))
    assert groups[1].responses == [prompter.response_ids(*text) for text in texts]
    assert [response[-1] == prompter.eos for response in groups[1].responses] == [True, False, True]


def test_collate_predicts_every_response_token_once_from_the_column_before_it(groups):
    batch, responses = collate(groups, pad=0), [response for group in groups for response in group.responses]
    width = max(len(group.prompt) for group in groups)
    found = [[] for _ in responses]
    last = {}
    targets = torch.stack([batch[key] for key in ("row", "column", "label", "response")], 1).tolist()
    for row, column, label, response in targets:
        found[response].append(label)
        place = response - sum(len(group.responses) for group in groups[:row]) + 1
        if response not in last:
            assert column == width - 1
            assert int(batch["ids"][row, column]) == groups[row].prompt[-1]
            assert int(batch["segments"][row, column]) == 0
        else:
            assert int(batch["ids"][row, column]) == last[response]
            assert int(batch["segments"][row, column]) == place
        own = [at for at in range(width, batch["ids"].shape[1]) if batch["segments"][row, at] == place]
        at = own[len(found[response]) - 1]
        assert int(batch["ids"][row, at]) == label
        assert int(batch["positions"][row, at]) == int(batch["positions"][row, column]) + 1
        assert at == column + 1 or response not in last
        last[response] = label
    assert found == responses
    assert [(int(a), int(b)) for a, b in zip(batch["chosen"], batch["rejected"], strict=True)] == [
        (0, 1), (2, 0), (3, 4), (3, 5),
    ]  # fmt: skip


def test_collate_pads_left_of_the_prompt_and_right_of_the_responses(groups):
    batch = collate(groups, pad=0)
    for row, group in enumerate(groups):
        segments = batch["segments"][row].tolist()
        content = [at for at, segment in enumerate(segments) if segment >= 0]
        assert content == list(range(content[0], content[-1] + 1))
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


def test_a_prompt_with_many_responses_is_split_into_groups_of_at_most_eight(prompter):
    pairs = [pair("Why?", f"good {n}", f"bad {n}") for n in range(11)] + [pair("How?", "x", "y")]
    groups = tokenise(pairs, prompter, 256, "pairs.jsonl")
    assert [len(group.responses) for group in groups] == [8, 8, 6, 2]
    assert [len(group.pairs) for group in groups] == [4, 4, 3, 1]
    told = [(group.responses[good], group.responses[bad]) for group in groups for good, bad in group.pairs]
    assert told == [(prompter.response_ids(row["chosen"]), prompter.response_ids(row["rejected"])) for row in pairs]


def test_a_group_of_seven_responses_takes_no_further_pair(prompter):
    pairs = [pair("Why?", "a", "b"), pair("Why?", "a", "c")] + [pair("Why?", f"x{n}", f"y{n}") for n in range(3)]
    assert [len(group.responses) for group in tokenise(pairs, prompter, 256, "pairs.jsonl")] == [7, 2]


def test_a_pair_beyond_the_context_is_refused_by_id(prompter):
    row = pair("Why?", "good", "bad " * 20)
    length = len(prompter.prompt_ids("Why?")) + len(prompter.response_ids(row["rejected"]))
    assert tokenise([row], prompter, length, "pairs.jsonl")
    with pytest.raises(UserError, match=rf"pairs\.jsonl, id Why\?/good: .* {length} tokens.* context is {length - 1}"):
        tokenise([row], prompter, length - 1, "pairs.jsonl")


def epoch(batches, number):
    batches.set_epoch(number)
    return list(batches)


@QUICK
@given(count=st.integers(1, 40), size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_every_epoch_is_a_permutation_in_batches(count, size, seed):
    batches = epoch(EpochBatches(count, size, seed), 3)
    assert sorted(chain(*batches)) == list(range(count))
    assert len(batches) == len(EpochBatches(count, size, seed)) == -(-count // size)
    assert all(len(batch) == size for batch in batches[:-1])


def test_epochs_differ_and_a_seed_fixes_them():
    batches = EpochBatches(50, 4, 0)
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert first != second
    assert epoch(batches, 0) == first == epoch(EpochBatches(50, 4, 0), 0)
    assert epoch(EpochBatches(50, 4, 1), 0) != first


def loader(seed=0):
    return ResumableLoader(list(range(23)), batch_sampler=EpochBatches(23, 4, seed), collate_fn=list)


@pytest.mark.parametrize("seen", range(7))
def test_a_loader_resumes_in_the_middle_of_an_epoch_and_goes_on_into_the_next(seen):
    whole = loader()
    whole.batch_sampler.set_epoch(2)
    expected = list(whole)
    killed = loader()
    killed.batch_sampler.set_epoch(2)
    iterator = iter(killed)
    before = [next(iterator) for _ in range(min(seen, 6))]
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(2 if seen < 6 else 3)
    if seen < 6:
        assert before + list(resumed) == expected
        resumed.batch_sampler.set_epoch(3)
    whole.batch_sampler.set_epoch(3)
    assert list(resumed) == list(whole) != expected
