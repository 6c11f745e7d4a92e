"""distil: a smaller model, models/<name>: some layers of a larger one, trained to be like it on text that it writes.

python -m pipeline distil --model smollm2-10l
"""

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Params
from pipeline.config.workspace import Workspace
from pipeline.data.preferences import read_prompts
from pipeline.decoding.request import Request
from pipeline.generation.rows import generate_stored, with_room
from pipeline.models.fetch import write_facts
from pipeline.models.loading import Source, resolve_device
from pipeline.training.batches import PromptGroup
from pipeline.training.distillation import HELD_OUT_SAMPLES, distill, text_groups


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Distil the model of that name; write its facts, measures beside its parent included, to results/models/.

    The text and the checkpoints of the training are kept in the scratch folder: a killed run goes on, and models of one
    parent share the text.

    Raises:
        UserError: the prompts or the layers are not what they should be.
    """
    spec = params.models[model]
    if spec.distillation is None:
        raise UserError(f"models.{model} is not distilled: set its source to distilled, and its distillation.")
    source = Source.of(params.models, workspace, spec.location)
    texts = [sampled_text(params, workspace, model, source, split) for split in ("train", "validation")]
    (train, held_out), left_out = [groups for groups, _ in texts], sum(count for _, count in texts)
    device = resolve_device(params.decoding.device)
    measures = distill(source, device, train, held_out, spec.distillation, model, spec, workspace)
    facts = write_facts(workspace, model, {**measures, "prompts_left_out": left_out})
    print(f"distil: {model}, {facts['parameters'] / 1e6:.1f} million parameters, is in {workspace.model(model)}")


def sampled_text(
    params: Params, workspace: Workspace, name: str, source: Source, split: str
) -> tuple[list[PromptGroup], int]:
    """What the parent of `name` writes to the prompts of a split, and how many prompts are left out.

    Those are left out that leave no room for a response in the parent's context.

    Raises:
        UserError: the split has no prompt, or none that leaves room.
    """
    parent, config = params.models[name].location, params.models[name].distillation
    assert config is not None
    rows = read_prompts(Data(config.prompts, parent, config.prompts), config.seed)
    prompts = [row["prompt"] for row in rows if row["split"] == split]
    if not prompts:
        raise UserError(f"{config.prompts}: no prompt of split {split} to distil {name} with: add some.")
    kept = with_room([source], prompts, config.max_new_tokens)
    left_out = len(prompts) - len(kept)
    if left_out:
        print(
            f"distil: {name}: {left_out} of {len(prompts)} prompts of split {split} left out: with "
            f"{config.max_new_tokens} new tokens they exceed the context of {source.context} tokens"
        )
    if not kept:
        raise UserError(
            f"{config.prompts}: no prompt of split {split} leaves room for {config.max_new_tokens} tokens in the "
            f"context of {source.context}: lower models.{name}.distillation.max_new_tokens."
        )
    samples = config.samples_per_prompt if split == "train" else HELD_OUT_SAMPLES
    requests = [
        Request(prompt, max_new_tokens=config.max_new_tokens, seed=config.seed, sample=sample)
        for prompt in kept
        for sample in range(samples)
    ]
    responses = generate_stored(requests, params, workspace, parent, "distil")
    return text_groups(responses, samples, source.prompter()), left_out
