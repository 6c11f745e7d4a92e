"""Gives the composition of conf/ its resolver `inputs`: Hydra and `dvc exp run` import this folder."""

import pipeline.config.inputs  # noqa: F401  registers it
