"""One command for every stage and tool of the project, run in its folder.

python -m pipeline train --objective positivity      # a stage, as `dvc repro` runs it
python -m pipeline trace "Describe a rainy Monday." --weights positivity=1
python -m pipeline train --help                      # what a command does and takes, with an example
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

STAGES = {
    "fetch": "get one model: models/<name>/",
    "distil": "make a smaller model from another: models/<name>/",
    "download": "get one published dataset: datasets/<name>/",
    "prepare": "read, check, label and split the preference data: results/prepare/",
    "train": "train the ARM of one objective: models/arms/<objective>/",
    "tune": "train what ARMs are compared with: models/rivals/",
    "generate": "every test prompt at every point of the sweep: results/generate/",
    "explain": "token rewards of some responses: results/explain/",
    "identify": "digests of models that judge or label: results/identify/",
    "judge": "a score for every row, and win rates against the control: results/judge/",
    "pareto": "the front, its figures, and the report: results/pareto/, results/report/",
    "weak_to_strong": "the ARMs on a ladder of bases: results/<weak_to_strong.name>/",
    "comparison": "every method at every point of the sweep: results/<comparison.name>/",
}
# Of each tool: the module whose main(arguments) it is, imported when it is called, and what it does.
TOOLS = {
    "sweep": ("pipeline.stages.sweep", "compose conf/, or run a configuration or many (Hydra)"),
    "plan": ("pipeline.stages.plan", "memory, time and judge calls of a run, before anything is loaded"),
    "trace": ("pipeline.generation.explain", "the token rewards of a response, in the terminal"),
    "choose": ("pipeline.stages.choose", "the weights for an outcome, chosen on validation prompts"),
    "dial": ("pipeline.stages.dial", "a dial from two sentences: sample, train an ARM, keep it"),
    "playground": ("pipeline.report.playground", "a local page: a slider for each objective, base and guided text"),
    "serve": ("pipeline.stages.serve", "guided decoding behind vLLM's OpenAI-compatible server"),
    "lm_eval": ("pipeline.generation.harness", "the guided law on the tasks of lm-evaluation-harness"),
    "rewardbench": ("pipeline.stages.rewardbench", "an ARM's accuracy as a reward model, on RewardBench's columns"),
    "report": ("pipeline.report.overview", "where the results are; the report in W&B"),
    "push": ("pipeline.stages.push", "upload an ARM, or all, to the Hugging Face Hub"),
    "gc": ("pipeline.data.stale_rows", "remove stored rows that no recent run used"),
}


def usage() -> str:
    """What `python -m pipeline --help` prints."""
    tools = {name: summary for name, (_, summary) in TOOLS.items()}
    sections = {"stages, which `dvc repro` runs": STAGES, "tools": tools}
    lines = [str(__doc__)]
    for title, commands in sections.items():
        lines += [f"{title}:", *(f"  {name:16}{summary}" for name, summary in commands.items()), ""]
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names with those that follow."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, rest = arguments[0], arguments[1:]
    if name not in (*STAGES, *TOOLS):
        (closest,) = get_close_matches(name, [*STAGES, *TOOLS], n=1, cutoff=0.0)
        sys.exit(f"error: there is no command {name}: did you mean {closest}? `python -m pipeline --help` lists all.")
    from pipeline.config.errors import guard
    from pipeline.stages import run_stage

    with guard():
        if name in STAGES:
            run_stage(name, rest)
        else:
            import_module(TOOLS[name][0]).main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
