"""Hydra's entry point: print the composition, or run generate to pareto for one or many configurations.

    python -m pipeline.stages.sweep --cfg job --resolve                          # what `make params` writes
    python -m pipeline.stages.sweep --multirun decoding.temperature=0.7,1.0      # one folder per job
    python -m pipeline.stages.sweep --multirun seed=0,1,2 sweep=simplex5
    python -m pipeline.stages.sweep --multirun experiment=weak_to_strong base=smollm2-10l,smollm2-20l,smollm2-135m

The ARMs are those that `dvc repro` trained; each job writes below Hydra's output directory, and finished rows are
shared with every other run through the row store.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.config.load import to_params
from pipeline.config.workspace import Workspace


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Generate and judge one composed configuration in its own folder."""
    from pipeline.config.errors import guard  # torch only when there is work to do
    from pipeline.stages import explain, generate, judge, pareto  # torch only when there is work to do

    job = Path(HydraConfig.get().runtime.output_dir)
    prepared = Workspace()
    workspace = Workspace(models=prepared.models, results=job, scratch=prepared.scratch)
    with guard():
        params = to_params(config)
        generate.run(params, workspace, prompts=prepared.results / "prepare" / "prompts.jsonl")
        explain.run(params, workspace)
        judge.run(params, workspace, prepared=prepared.results)
        pareto.run(params, workspace, trained=prepared.results)


if __name__ == "__main__":
    main()
