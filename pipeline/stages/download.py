"""download: a dataset of the Hub as a folder of its files.

python -m pipeline.stages.download datasets/full-hh-rlhf
"""

from pipeline.config import Workspace
from pipeline.params import Params
from pipeline.preferences import sources
from pipeline.stages import main


def run(params: Params, workspace: Workspace, folder: str) -> None:
    """Download what `data.download` wants in that folder."""
    wanted = next(one for one in params.data.download if one.folder == folder)
    sources.download(wanted)
    print(f"download: {wanted.repository} is in {folder}")


if __name__ == "__main__":
    main(run)
