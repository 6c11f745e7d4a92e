"""download: a dataset of the Hub as a folder of its files.

python -m pipeline download --dataset dataset0      # the first of data.download, as DVC counts them
"""

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data import sources


def run(params: Params, workspace: Workspace, dataset: str) -> None:
    """Download the entry of `data.download` whose number the name ends in."""
    wanted = params.data.download[int(dataset.removeprefix("dataset"))]
    sources.download(wanted)
    print(f"download: {wanted.repository} is in {wanted.folder}")
