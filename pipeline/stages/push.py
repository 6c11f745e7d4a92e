"""Upload an ARM to the Hugging Face Hub, as others fetch it: its base by its name there, a card with code that runs.

python -m pipeline push positivity your-name/arm-positivity --base HuggingFaceTB/SmolLM2-135M-Instruct
python -m pipeline push positivity your-name/arm-positivity --base … --dry-run release/   # look at it, upload nothing
python -m pipeline push all your-name/arms --base …      # a folder for each objective, as of one ARM for all mixes
make params ARGS="'objectives.positivity.pretrained={source: hub, location: your-name/arm-positivity}'"
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config.errors import UserError
from pipeline.config.inputs import ALL
from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.training import hub


def main(arguments: Sequence[str]) -> None:
    """Release the ARM of an objective, or all of them, and push what was written."""
    parser = ArgumentParser("python -m pipeline push", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="whose ARM is pushed: models/arms/<objective>; all: every one, in folders")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--base", help="owner/name of what the ARM was made from; left out where it came from the Hub")
    parser.add_argument("--private", action="store_true", help="where the repository does not exist yet")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write what would be uploaded there, and stop")
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        params = load_params()
        spec = params.models[params.arm.base]
        if spec.source != "hub":
            raise UserError(
                f"{params.arm.base} did not come from the Hub: say what it is called there, --base owner/name."
            )
        base = spec.location
    with TemporaryDirectory() as scratch:
        out = options.dry_run or Path(scratch) / options.objective
        names = list(load_params().objectives) if options.objective == ALL else [options.objective]
        arms = {name: Workspace().arm(name) for name in names}
        for file in hub.release(arms, options.repository, base, out):
            print(f"{file.stat().st_size:12,d}  {file.relative_to(out)}")
        if options.dry_run is None:
            print(f"hub: {hub.push(out, options.repository, options.private)}")
