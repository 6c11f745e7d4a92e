"""Which jobs of a sweep share models: those whose options agree up to training."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.stages.sweep import training_digest
from tests.tiny import ROOT


def digest(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return training_digest(OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "objectives.positivity.beta=3.0", "objectives.conciseness.wanted='Be brief.'", "arm.rank=4",
        "arm.dropout=0.1", "trainer.lr=1.0e-4", "trainer.epochs=2", "loss=arm", "loss.margin=0.5",
        "data.sampling.temperature=1.0", "data.limits.train=100", "models.smollm2-135m.dtype=float32",
        "judge.confidence=0.9",
    ],
)  # fmt: skip
def test_jobs_that_train_otherwise_have_models_of_their_own(override):
    assert digest(override) != digest()


@pytest.mark.parametrize(
    "override",
    ["decoding.temperature=0.7", "decoding.max_new_tokens=8", "sweep=ends", "explain.prompts=0", "tracking=disabled"],
)
def test_jobs_that_only_generate_or_judge_otherwise_share_their_models(override):
    assert digest(override) == digest()
