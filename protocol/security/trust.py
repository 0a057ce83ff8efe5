"""Which public key has which role: the files of a directory of keys, read anew when they change.

    trusted/*.key           SERVICE: everything but what an operator alone may
    trusted/ROLE/*.key      that role: index, engine, router, gateway, operator
    operators/*.key         OPERATOR; let in also without a file in ``trusted``

A key in several places has all of their roles. A file that is damaged gives nobody a right. What cannot be
read at the moment (no descriptor is left, a disk fails) changes nothing: the roles last read hold on.

Owns the roles of keys. Knows no socket; ``refresh`` is called by guard.py's thread, ``roles`` by any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import zmq.auth

from microserve.protocol.errors import ConfigError
from microserve.protocol.security.rights import NOBODY, Role, Roles

STATED_ROLES = (Role.INDEX, Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR)
"""Those that a directory may name."""

Signature = tuple[tuple[str, int, int, int], ...]


class Trust:
    """Of the key directory ``root``. Raises :class:`ConfigError` for a directory of no role in
    ``trusted``."""

    def __init__(self, root: Path) -> None:
        self._places = list(places(root))
        self._directories = [str(directory) for directory, _ in self._places]
        self._root = root
        self._signature: Signature | None = None
        self._roles: dict[str, Roles] = {}
        self._was_missing = False
        self.refresh()

    def roles(self, key: str) -> Roles:
        """Of a public key (Z85); :data:`NOBODY` of one that is not trusted."""
        return self._roles.get(key, NOBODY)

    def refresh(self) -> set[str]:
        """Read what has changed; returns the keys that have lost a role since the last time."""
        try:
            signature = self._sign()
            if signature == self._signature:
                return set()
            found = self._read()
        except OSError:
            return set()
        before, self._roles, self._signature = self._roles, found, signature
        return {key for key, roles in before.items() if roles - found.get(key, NOBODY)}

    def _sign(self) -> Signature:
        """Raises ``OSError`` also when ``trusted`` is missing for the first time: it may be about to be
        replaced."""
        is_missing = not os.path.isdir(self._directories[0])
        was_missing, self._was_missing = self._was_missing, is_missing
        if is_missing and not was_missing:
            raise FileNotFoundError(self._root / "trusted")
        return tuple(
            (file, stat.st_mtime_ns, stat.st_size, stat.st_ino)
            for directory in self._directories
            for file, stat in _key_stats(directory)
        )

    def _read(self) -> dict[str, Roles]:
        found: dict[str, Roles] = {}
        for directory, role in self._places:
            for file, _ in key_files(directory):
                if key := read_key(file):
                    found[key] = found.get(key, NOBODY) | {role}
        return found


def places(root: Path) -> Iterator[tuple[Path, Role]]:
    """Directories of public keys, each with the role that it gives. Raises :class:`ConfigError`."""
    trusted = root / "trusted"
    for each in sorted(trusted.iterdir()) if trusted.is_dir() else ():
        if each.is_dir() and not each.name.startswith(".") and each.name not in STATED_ROLES:
            raise ConfigError(
                f"{each} is no role's: {', '.join(STATED_ROLES)} (or keys in {trusted} itself)",
                field="bus.curve_dir",
            )
    yield trusted, Role.SERVICE
    for role in STATED_ROLES:
        yield trusted / role, role
    yield root / "operators", Role.OPERATOR


def key_files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """``*.key`` in order; a directory that is not there has none."""
    for file, stat in _key_stats(str(directory)):
        yield Path(file), stat


def _key_stats(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """As :func:`key_files`, for who looks every second: paths as objects would be half of it."""
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if name.endswith(".key") and not name.startswith("."):
            try:
                yield (file := f"{directory}/{name}"), os.stat(file)
            except FileNotFoundError:
                continue  # gone since


def read_key(file: Path) -> str:
    """The public key (Z85) of a file; empty if it holds none. Raises ``OSError`` if it cannot be read."""
    try:
        public, _ = zmq.auth.load_certificate(file)
        return public.decode()
    except (ValueError, IndexError):
        return ""
