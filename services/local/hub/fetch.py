"""A model from the Hub into the cache: looked at first, refused before its weights come, whole at the end.

    listing -> config.json: is it served? -> index of weights -> room on disk, in memory -> all, weights last

Owns that order. A revision stands for the new commit when all of that commit is there, not sooner; one
process at a time fetches a repository.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microserve.protocol.settings.settings import Settings
from microserve.services.engine.model.directory.families import refusal_of
from microserve.services.engine.room import unpromised_room
from microserve.services.local.hub.client import HubClient, digest_of
from microserve.services.local.hub.files import (
    CONFIG,
    WEIGHTS_INDEX,
    Listing,
    Needed,
    RemoteFile,
    needed_of,
    require_config,
    wants_index,
)
from microserve.services.local.hub.name import HubError, ModelName, NotReached
from microserve.services.local.hub.place import Place, forget, keep
from microserve.services.local.hub.sizes import check_disk, check_memory, in_bytes, sizes_of
from microserve.services.local.hub.streams import fetch_together

Report = Callable[[str, float | None], None]
"""Called with what is being done and the part of it that is done, in [0, 1] (None: cannot be said)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of a model."""

    weights: bool = True
    settings: Settings | None = None
    """Of who is to serve it here: it must fit. None: it need not."""
    any_family: bool = False
    """Also of a family that our own model code does not know."""
    verify: bool = False
    """Read what is there already, too, and fetch anew what is damaged."""


def fetch(place: Place, name: ModelName, wish: Wish, report: Report = lambda what, part: None) -> Path:
    """The directory of the snapshot. Raises :class:`HubError`; what has come until then is gone on with."""
    if place.is_offline:
        raise NotReached(f"{name} is not in {place.cache}, and HF_HUB_OFFLINE forbids to fetch it")
    try:
        with _alone(place, name, report):
            report(f"Asking {place.endpoint} for {name}", None)
            return _Fetching(place, name, wish, report).run()
    except OSError as error:
        raise _failed(place, name, error) from None


class _Fetching:
    def __init__(self, place: Place, name: ModelName, wish: Wish, report: Report) -> None:
        self._place, self._name, self._wish, self._report = place, name, wish, report
        self._client = HubClient(place, name)

    def run(self) -> Path:
        place, name = self._place, self._name
        was_here = place.repo(name).exists()
        try:
            listing, needed = self._look()
        except HubError:
            is_ours = not was_here and not (place.repo(name) / "refs").exists()
            if is_ours:  # what was looked at is of no use
                forget(place, name)
            raise
        for file in needed.small:
            self._fetch(listing, file)
        if self._wish.weights:
            self._fetch_weights(listing, needed)
        keep(place, name, listing.commit, needed)
        return place.snapshot(name, listing.commit)

    def _look(self) -> tuple[Listing, Needed]:
        """What is to be fetched. Raises :class:`HubError` for what is not served, or has no room here."""
        place, name = self._place, self._name
        listing = self._client.listing()
        require_config(name.repo, listing.files)
        config = self._json(listing, CONFIG)
        if not self._wish.any_family and (why := refusal_of(config)):
            raise HubError(f"{name} cannot be served: {why}")
        index = self._json(listing, WEIGHTS_INDEX) if wants_index(listing.files) else None
        needed = needed_of(name.repo, listing, index)
        wanted = needed.files if self._wish.weights else needed.small
        for file in wanted if self._wish.verify else ():
            self._throw_away_if_damaged(listing, file)
        missing_nbytes = sum(file.nbytes - self._here_nbytes(listing, file) for file in wanted)
        check_disk(str(name), missing_nbytes, place.free_nbytes, str(place.cache))
        if (settings := self._wish.settings) is not None:
            check_memory(str(name), config, needed.weights_nbytes, settings, unpromised_room())
        self._tell(listing, needed, config, missing_nbytes)
        return listing, needed

    def _json(self, listing: Listing, path: str) -> dict[str, Any]:
        if self._wish.verify:
            self._throw_away_if_damaged(listing, listing.files[path])
        file = self._client.fetch(listing.commit, listing.files[path], lambda _: None)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise HubError(f"{path} of {self._name} is no JSON object")
        return content

    def _fetch(self, listing: Listing, file: RemoteFile) -> None:
        what = f"Fetching {file.path} ({in_bytes(file.nbytes)})"

        def tell(nbytes: int) -> None:
            self._report(what, min(1.0, nbytes / file.nbytes) if file.nbytes else None)

        self._client.fetch(listing.commit, file, tell)

    def _fetch_weights(self, listing: Listing, needed: Needed) -> None:
        if len(needed.weights) == 1:
            self._fetch(listing, needed.weights[0])
            return
        total_nbytes = needed.weights_nbytes
        what = f"Fetching {len(needed.weights)} files of weights ({in_bytes(total_nbytes)})"
        fetch_together(
            needed.weights,
            lambda file, progress: self._client.fetch(listing.commit, file, progress),
            lambda nbytes: self._report(what, min(1.0, nbytes / total_nbytes) if total_nbytes else None),
        )

    def _here_nbytes(self, listing: Listing, file: RemoteFile) -> int:
        target = self._place.snapshot(self._name, listing.commit) / file.path
        if target.is_file() and target.stat().st_size == file.nbytes:
            return file.nbytes
        return self._client.partial_nbytes(file)

    def _throw_away_if_damaged(self, listing: Listing, file: RemoteFile) -> None:
        target = self._place.snapshot(self._name, listing.commit) / file.path
        if not target.is_file():
            return
        self._report(f"Checking {file.path} ({in_bytes(file.nbytes)})", None)
        if target.stat().st_size != file.nbytes or digest_of(target, file.digest) != file.digest:
            self._report(f"{file.path} is damaged", None)
            target.resolve().unlink()
            target.unlink(missing_ok=True)

    def _tell(self, listing: Listing, needed: Needed, config: dict[str, Any], missing_nbytes: int) -> None:
        settings = self._wish.settings or Settings()
        dtype = settings.model.dtype
        sizes = sizes_of(self._name.repo, config, needed.weights_nbytes, dtype)
        told = f"{self._name} ({listing.commit[:8]}): {in_bytes(missing_nbytes)} to fetch"
        if self._wish.weights:
            told += f"; in memory {in_bytes(sizes.weights_nbytes)} of weights in {dtype}"
            if sizes.kv_token_nbytes:
                told += f" and {in_bytes(1000 * sizes.kv_token_nbytes)} of KV for 1,000 tokens"
        self._report(told, None)


@contextmanager
def _alone(place: Place, name: ModelName, report: Report) -> Iterator[None]:
    """Others that want the same wait, and then find it."""
    place.records.mkdir(parents=True, exist_ok=True)
    with open(place.records / f".{name.folder}.lock", "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Waiting for another process that fetches {name.repo}", None)
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: who comes second fetches as well
            pass
        yield


def _failed(place: Place, name: ModelName, error: OSError) -> HubError:
    where = error.filename or place.cache
    if error.errno == errno.ENOSPC:
        return HubError(f"the disk of {place.cache} is full; what has come of {name} is kept")
    return HubError(
        f"{name} cannot be kept in {where}: {error.strerror or error}; HF_HOME=DIRECTORY takes another place"
    )
