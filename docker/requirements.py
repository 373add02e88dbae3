"""Print what the image installs: the project's dependencies, and every extra that a server may need.

Usage: python requirements.py pyproject.toml
"""

import sys
import tomllib
from pathlib import Path

# Servers of its own and a compiler's worth of tools: not in an image that runs against real ones.
LEFT_OUT = frozenset({"embedded", "dev"})


def requirements(pyproject: Path) -> list[str]:
    """The requirements, as pyproject.toml has them."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(line for name in extras if name not in LEFT_OUT for line in extras[name])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]))) + "\n")
