"""A strategy's source as it travels: the text of a file, or a package's files in one text (WIRE.md 6.4).

A package's text is for people to read, too: a first line with a mark that occurs in none of the files, then
each file behind a line with the mark and its name. Knows no Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from microserve.protocol.errors import ConfigError

TOP = "__init__.py"
"""The file that is the package's own, and the name that a single file goes by."""
HEAD = "# microserve package "
MAX_FILES = 32


def packed(files: Mapping[str, str]) -> str:
    """One text of the files, by their names relative to the package; of a single file, its own."""
    if [*files] == [TOP]:
        return files[TOP]
    whole = {name: text if text.endswith("\n") or not text else f"{text}\n" for name, text in files.items()}
    mark = hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()[:16]
    parts = [f"# {mark} {name}\n{text}" for name, text in sorted(whole.items())]
    return f"{HEAD}{mark}\n" + "".join(parts)


def unpacked(source: str) -> dict[str, str]:
    """The files of a text; one, :data:`TOP`, of a text that is no package. Raises :class:`ConfigError`."""
    head, _, rest = source.partition("\n")
    if not head.startswith(HEAD):
        return {TOP: source}
    border = f"# {head.removeprefix(HEAD)} "
    files: dict[str, str] = {}
    name = ""
    for line in rest.splitlines(keepends=True):
        if line.startswith(border):
            name = line.removeprefix(border).rstrip("\n")
            if name in files or not _is_name(name):
                raise ConfigError(f"{name!r} is no file of a package, or is there twice", field="source")
            files[name] = ""
        elif not name:
            raise ConfigError("a package's text begins with the name of a file", field="source")
        else:
            files[name] += line
    if TOP not in files or len(files) > MAX_FILES:
        raise ConfigError(f"a package has an {TOP} and at most {MAX_FILES} files", field="source")
    return files


def _is_name(name: str) -> bool:
    parts = name.removesuffix(".py").split("/")
    return name.endswith(".py") and all(part.isidentifier() for part in parts)
