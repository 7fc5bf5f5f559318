"""Print what the project's pyproject.toml requires, with the extras named as arguments, one requirement a line.

An image's packages are installed from this before the project is, so that a changed line of code leaves them alone.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])]
for requirement in (line for group in groups for line in group):
    # An extra that includes another one names the project; the caller lists both.
    if not requirement.startswith(f"{project['name']}["):
        print(requirement)
