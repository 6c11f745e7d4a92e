"""A project's models as a decoder, for notebooks, the playground, and code of one's own."""

from collections.abc import Collection
from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.generation.model_set import ModelSet


def load_experiment(
    folder: Path | str = ".",
    *,
    base: str | None = None,
    arms: Collection[str] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> GuidedDecoder:
    """A decoder for the base and the ARMs of a project, as its params.yaml describes them.

        decoder = load_experiment()
        requests = [Request("Describe a rainy Monday morning.", {"positivity": 1.0})]
        for index, generation in decoder.generate(requests):
            print(generation.text)

    Args:
        folder: of the project: it holds params.yaml and models/.
        base: one of the project's models; None: the one that params.yaml steers.
        arms: the objectives whose ARMs are loaded; None: all.
        device: None: `decoding.device`.
        batch_size: rows generated at once; None: `decoding.batch_size`.

    Raises:
        UserError: params.yaml is missing or invalid, a model or an ARM is not there, or they do not fit into memory.
    """
    folder = Path(folder)
    params = load_params(folder / "params.yaml")
    workspace = Workspace(folder / "models", folder / "results", folder / "scratch")
    base, arms = params.base if base is None else base, list(params.objectives if arms is None else arms)
    needed = [("base", base, list(params.models), workspace.model(base))]
    needed += [("ARM", name, list(params.objectives), workspace.arm(name)) for name in arms]
    for kind, name, known, place in needed:
        if name not in known:
            raise UserError(f"{folder / 'params.yaml'} has no {kind} {name}: choose one of {', '.join(known)}.")
        if not place.is_dir():
            raise UserError(f"{place} is not there yet: run `make repro` or `dvc pull` in {folder.resolve()}.")
    decoding = params.decoding
    return ModelSet(params, workspace, base, arms).decoder(device or decoding.device, batch_size or decoding.batch_size)
