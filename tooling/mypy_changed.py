"""Type-check the files that a commit changes: the hook's ``mypy``. ``make check`` looks at everything.

    python tooling/mypy_changed.py FILE ...

Our folders are links below ``.src/microserve``, and each file has one name for mypy: ``protocol/types.py`` is
``microserve.protocol.types`` and nothing else. Files of tests, examples and tooling go by their paths, in a
run of their own, as in ``make check``. Exit code: mypy's, the first that is not 0.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCES = ("protocol", "kvcache", "kernels", "services", "gateway", "testing")
BY_PATH = ("tests", "examples", "tooling")


def module_of(path: Path) -> str:
    """The name under which the product imports a file of its folders."""
    parts = path.with_suffix("").parts
    return ".".join(("microserve", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def main(arguments: list[str]) -> int:
    paths = [Path(each) for each in arguments]
    modules = [word for path in paths if path.parts[0] in SOURCES for word in ("-m", module_of(path))]
    others = [str(path) for path in paths if path.parts[0] in BY_PATH]
    mypy = [sys.executable, "-P", "-m", "mypy"]
    codes = [subprocess.call([*mypy, *words]) for words in (modules, others) if words]
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
