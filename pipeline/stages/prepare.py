"""prepare: preference rows, one file of pairs per objective, and the prompts to generate from."""

from pipeline import generation, preferences
from pipeline.config import Params, Sampling, UserError, Workspace
from pipeline.decoder import Request
from pipeline.stages import main
from pipeline.store import Row, write_json, write_jsonl


def run(params: Params, workspace: Workspace) -> None:
    """Read rows, or sample and label responses; write results/prepare/."""
    data, out = params.data, workspace.results / "prepare"
    if data.sampling is None:
        rows = preferences.read_rows(data, params.objectives, params.seed)
    else:
        prompts = preferences.read_prompts(data, params.seed)
        samples = sample(prompts, params, data.sampling, workspace)
        rows = list(preferences.label_samples(prompts, samples, params.objectives))
    pairs = {
        name: preferences.pairs_of(rows, name, objective, data.label_noise, params.seed)
        for name, objective in params.objectives.items()
    }
    for name, found in pairs.items():
        if missing := set(preferences.SPLITS) - {pair["split"] for pair in found}:
            raise UserError(f"{data.path}: no pair for {name} in split {min(missing)}: add rows with that label.")
    write_jsonl(out / "rows.jsonl", rows)
    for name, found in pairs.items():
        write_jsonl(out / "pairs" / f"{name}.jsonl", found)
    unseen = preferences.unseen_prompts(data, rows)
    write_jsonl(out / "prompts.jsonl", ({"prompt": prompt} for prompt in unseen))
    write_json(out / "data_card.json", card := preferences.data_card(rows, pairs))
    for name, counts in card["objectives"].items():
        print(f"prepare: {name}: pairs {counts['pairs']}, ties {counts['ties']}")


def sample(
    prompts: list[Row], params: Params, sampling: Sampling, workspace: Workspace
) -> dict[str, list[tuple[str, bool]]]:
    """Responses of the unguided base by prompt id, in the order drawn, and whether each ended by itself."""
    wanted = {
        (prompt["id"], number): Request(
            prompt["prompt"],
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            seed=params.seed,
            sample=number,
        )
        for prompt in prompts
        for number in range(sampling.responses_per_prompt)
    }
    rows = generation.generate_stored(list(wanted.values()), params, workspace, params.data.sampler, "prepare")
    samples: dict[str, list[tuple[str, bool]]] = {prompt["id"]: [] for prompt in prompts}
    for (prompt_id, _), row in zip(wanted, rows, strict=True):
        samples[prompt_id].append((row["response"], row["finish"] == "eos"))
    return samples


if __name__ == "__main__":
    main(run)
