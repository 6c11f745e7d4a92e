"""Where to look at the results.

python -m pipeline.report
"""

from pathlib import Path

for name, file in (("report", "report/index.html"), ("front", "pareto/front.csv"), ("picture", "pareto/front.png")):
    found = Path("results") / file
    print(f"{name:8} {found if found.exists() else f'{found} is not there yet: run `make repro`'}")
