"""Sweeps of whole experiments, one after the other and in workers, in a throw-away copy of the repository."""

from importlib.util import find_spec

import pytest

from tests.stages.repository import compose, run


def fronts_of(copy, folder, *launcher):
    """The front of each job of a sweep of two, whose rows no store knows.

    In float32, where rows do not depend on their neighbours: both jobs have the controls in common, and which of them
    generates these is a race.
    """
    (copy / "scratch/store/generate.jsonl").rename(copy / "scratch/known.jsonl")
    printed = run(
        copy, "python", "-m", "pipeline", "sweep", "--multirun", "experiment=smoke",
        "decoding.temperature=0.8,1.0", f"hydra.sweep.dir=scratch/{folder}", "+models.tiny.dtype=float32", *launcher,
    )  # fmt: skip
    (copy / "scratch/known.jsonl").replace(copy / "scratch/store/generate.jsonl")
    fronts = sorted((copy / f"scratch/{folder}").glob("*/pareto/front.csv"))
    assert len(fronts) == 2, printed[-3000:]
    return [front.read_text() for front in fronts]


@pytest.fixture(scope="module")
def serial(copy):
    compose(copy, "experiment=smoke")
    return fronts_of(copy, "serial")


def test_multirun_writes_a_folder_per_job(serial):
    assert serial[0] != serial[1]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_jobs_of_a_sweep_in_two_workers_equal_those_one_after_the_other(copy, serial, launcher):
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if find_spec("hydra_plugins") is None or find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install 'genarm-pipeline[ray]'")
    workers = {"joblib": ["hydra.launcher.n_jobs=2"], "ray": ["+hydra.launcher.ray.init.num_cpus=2"]}
    assert fronts_of(copy, launcher, f"hydra/launcher={launcher}", *workers.get(launcher, [])) == serial


def test_each_job_of_a_sweep_trains_what_it_needs_and_only_once(copy):
    """One job's ARMs are the project's own; of the other one ARM is new, which a further job then shares."""
    # The best weights are kept, and of a slow training these may be those before its first update, whatever β is.
    options = ["experiment=smoke", "trainer.warmup_steps=0", "trainer.epochs=1", "trainer.lr=0.1"]
    compose(copy, *options)
    run(copy, "dvc", "repro", "-q")
    options.append("hydra.sweep.dir=scratch/betas")
    sweep = ["python", "-m", "pipeline", "sweep", "--multirun", *options]
    printed = run(copy, *sweep, "objectives.positivity.beta=0.02,0.5")
    assert printed.count("Running stage 'train@positivity'") == 1 and "Running stage 'train@conciseness'" not in printed
    same, other = (path.read_text() for path in sorted((copy / "scratch/betas").glob("*/pareto/front.csv")))
    assert same == (copy / "results/pareto/front.csv").read_text() != other
    again = run(copy, *sweep, "objectives.positivity.beta=0.5", "seed=0", "decoding.temperature=0.5,0.7")
    assert "Running stage" not in again
    others = run(copy, *sweep, "objectives.positivity.beta=0.5", "objectives.conciseness.beta=0.3")
    assert others.count("Running stage 'train@conciseness'") == 1 and "Running stage 'train@positivity'" not in others
