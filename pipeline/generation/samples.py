"""Preference rows of sampled responses: drawn from the unguided sampler, then scored, judged, or contrasted."""

from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.config.schema import Params, Sampling
from pipeline.config.workspace import Workspace
from pipeline.data.card import DataCard
from pipeline.data.contrast import Sample, conditions, contrast_pairs, instructed
from pipeline.data.files import Row
from pipeline.data.labelling import label_samples
from pipeline.data.preferences import read_prompts
from pipeline.decoding.request import Request
from pipeline.evaluation.annotation import annotate, check_annotator
from pipeline.evaluation.contrast_card import contrast_card
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.statistics import Bootstrap
from pipeline.generation.rows import generate_stored, with_room
from pipeline.models.loading import Source

Samples = dict[str | None, dict[str, list[Sample]]]  # by instruction (None: the bare prompt) and prompt id


def sampled_rows(
    params: Params,
    sampling: Sampling,
    workspace: Workspace,
    card: DataCard,
    used: dict[str, Row],
    classifiers: dict[str, Row],
) -> list[Row]:
    """Rows of sampled responses: every two of a prompt where scorers or annotators label them, then those of sentences.

    Args:
        params: the experiment.
        sampling: how responses are drawn.
        workspace: where models and stores are.
        card: counts prompts without room.
        used: receives per objective what there is to say of its source.
        classifiers: receives the classifier of every objective of two sentences.
    """
    by_source = {name: objective.source(params.data) for name, objective in params.objectives.items()}
    contrasts = {name: params.objectives[name] for name, source in by_source.items() if source == "contrast"}
    scored = {name: params.objectives[name] for name, source in by_source.items() if source == "scorer"}
    annotated = [name for name, source in by_source.items() if source in ("judge", "reward_model")]
    resources = Resources(params.models, workspace, params.decoding.device)
    for name in annotated:
        check_annotator(name, params.objectives[name], resources)
    prompts = read_prompts(params.data, params.seed)
    instructions = [instruction for objective in contrasts.values() for instruction in conditions(objective)]
    bare = [None] if scored or annotated else []
    samples = sample_responses(prompts, [*bare, *instructions], params, sampling, workspace, card)
    rows = list(label_samples(prompts, samples[None], scored)) if bare else []
    for name in annotated:
        used[name]["annotator"] = dict(annotate(rows, name, params.objectives[name], resources))
    for name, objective in contrasts.items():
        counts = Counter[str]()
        pairs = contrast_pairs(prompts, name, objective, samples, counts)
        summary, classifier = contrast_card(name, pairs, counts, Bootstrap.of(params.judge, params.seed))
        used[name] |= summary
        classifiers[name] = classifier.to_json()
        rows += pairs
    return rows


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
    source = Source.of(params.models, workspace, params.data.sampler)
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
    fitting_ids = []
    for prompt in prompts:
        if all(texts[instruction][prompt["id"]] in whole for instruction, whole in fitting.items()):
            fitting_ids.append(prompt["id"])
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
        for prompt_id in fitting_ids
        for number in range(sampling.responses_per_prompt)
    }
    rows = generate_stored(list(requests.values()), params, workspace, params.data.sampler, "prepare")
    samples: Samples = {instruction: {prompt["id"]: [] for prompt in prompts} for instruction in texts}
    for (instruction, prompt_id, _), row in zip(requests, rows, strict=True):
        samples[instruction][prompt_id].append((row.response, row.ended))
    return samples
