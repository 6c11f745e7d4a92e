"""Responses of the unguided sampler to prompts, bare and under instructions: what preferences are made of."""

from collections.abc import Iterable, Sequence

from pipeline.config.schema import Params, Sampling
from pipeline.config.workspace import Workspace
from pipeline.data.card import DataCard
from pipeline.data.contrast import Sample, instructed
from pipeline.data.files import Row
from pipeline.decoding.request import Request
from pipeline.generation.rows import generate_stored, with_room
from pipeline.models.loading import Source

Samples = dict[str | None, dict[str, list[Sample]]]  # by instruction (None: the bare prompt) and prompt id


def sample_responses(
    prompts: Sequence[Row],
    instructions: Iterable[str | None],
    params: Params,
    sampling: Sampling,
    workspace: Workspace,
    card: DataCard,
) -> Samples:
    """Responses in the order drawn, and whether each ended by itself; rows that the store has are not drawn again.

    A prompt that leaves no room for a response under one of the instructions has none under any, and is counted.
    """
    source = Source.of(params, workspace, params.data.sampler)
    texts = {
        instruction: {
            prompt["id"]: prompt["prompt"] if instruction is None else instructed(prompt["prompt"], instruction)
            for prompt in prompts
        }
        for instruction in dict.fromkeys(instructions)
    }
    fitting = {
        instruction: set(with_room([source], list(by_id.values()), sampling.max_new_tokens))
        for instruction, by_id in texts.items()
    }
    kept = []
    for prompt in prompts:
        if all(texts[instruction][prompt["id"]] in whole for instruction, whole in fitting.items()):
            kept.append(prompt["id"])
        else:
            card.drop("a prompt that leaves no room for a response in the base's context", f"prompt {prompt['id']}")
    requests = {
        (instruction, prompt_id, number): Request(
            by_id[prompt_id],
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            seed=params.seed,
            sample=number,
        )
        for instruction, by_id in texts.items()
        for prompt_id in kept
        for number in range(sampling.responses_per_prompt)
    }
    rows = generate_stored(list(requests.values()), params, workspace, params.data.sampler, "prepare")
    samples: Samples = {instruction: {prompt["id"]: [] for prompt in prompts} for instruction in texts}
    for (instruction, prompt_id, _), row in zip(requests, rows, strict=True):
        samples[instruction][prompt_id].append((row["response"], row["finish"] == "eos"))
    return samples
