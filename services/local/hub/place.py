"""Where models by name are kept, and which of them are whole: huggingface_hub's cache, read without it.

    $HF_HUB_CACHE, else $HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub
        models--ORG--NAME/refs/REVISION             a commit
        models--ORG--NAME/snapshots/COMMIT/FILE     a link to the file's content in blobs/
    ~/.cache/microserve/hub/models--ORG--NAME@COMMIT.json    which files are needed of it, and their lengths

The record is ours: what others have fetched may lack files that they did not need. Owns these places and
what the environment says of them; fetches nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from microserve.services.local.demo.model import default_cache
from microserve.services.local.hub.files import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    WEIGHTS_INDEX,
    Needed,
    shards_of,
)
from microserve.services.local.hub.name import HubError, ModelName

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Place:
    """What the environment says of the Hub and of its cache."""

    cache: Path
    records: Path
    endpoint: str = DEFAULT_ENDPOINT
    token: str = field(default="", repr=False)
    is_offline: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """By the variables of huggingface_hub. Raises :class:`HubError` for an endpoint that is none."""
        base = environment.get("XDG_CACHE_HOME") or str(default_cache(environment).parent)
        home = _expanded(environment.get("HF_HOME") or os.path.join(base, "huggingface"))
        cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
        endpoint = (environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
            raise HubError(f"HF_ENDPOINT {endpoint!r} is not http(s)://HOST")
        return cls(
            _expanded(cache) if cache else home / "hub",
            default_cache(environment) / "hub",
            endpoint,
            _token(environment, home),
            any(_is_true(environment.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
        )

    def repo(self, name: ModelName) -> Path:
        return self.cache / name.folder

    def snapshot(self, name: ModelName, commit: str) -> Path:
        return self.repo(name) / "snapshots" / commit

    def record(self, name: ModelName, commit: str) -> Path:
        return self.records / f"{name.folder}@{commit}.json"

    @property
    def free_nbytes(self) -> int:
        """Of the disk on which the cache is, or will be."""
        place = self.cache
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free


def commit_of(place: Place, name: ModelName) -> str | None:
    """What the revision stands for, as far as the cache knows."""
    if name.is_pinned:
        return name.revision
    try:
        commit = (place.repo(name) / "refs" / name.revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def whole(place: Place, name: ModelName, *, weights: bool = True) -> Path | None:
    """The snapshot that was fetched for us and still has every file in its length, or None."""
    commit = commit_of(place, name)
    if commit is None:
        return None
    snapshot = place.snapshot(name, commit)
    try:
        record = json.loads(place.record(name, commit).read_text())
        lengths = {**record["small"], **(record["weights"] if weights else {})}
        if CONFIG in lengths and all((snapshot / file).stat().st_size == lengths[file] for file in lengths):
            return snapshot
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def usable(place: Place, name: ModelName, *, weights: bool = True) -> Path | None:
    """A snapshot that somebody else has fetched, as far as one can tell without the Hub."""
    commit = commit_of(place, name)
    if commit is None:
        return None
    snapshot = place.snapshot(name, commit)
    if not all((snapshot / file).is_file() for file in (CONFIG, TOKENIZER)):
        return None
    return snapshot if not weights or _has_weights(snapshot) else None


def keep(place: Place, name: ModelName, commit: str, needed: Needed) -> None:
    """Say that all of it is there: from now on the revision is this commit, also for others."""
    record = {
        kind: {file.path: file.nbytes for file in files}
        for kind, files in (("small", needed.small), ("weights", needed.weights))
    }
    with suppress(OSError):  # then the Hub is asked once more the next time
        _replace(place.record(name, commit), json.dumps({"repo": name.repo, **record}, indent=1))
    if not name.is_pinned:
        _replace(place.repo(name) / "refs" / name.revision, commit)


@dataclass(frozen=True, slots=True)
class Kept:
    """One commit in the cache."""

    repo: str
    commit: str
    revisions: tuple[str, ...]
    """Branches and tags that stand for it."""
    nbytes: int
    is_whole: bool


def kept(place: Place) -> Iterator[Kept]:
    """All models of the cache, in order of their names; also those that others have fetched."""
    for folder in sorted(place.cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        refs = folder / "refs"
        by_commit: dict[str, list[str]] = {}
        for ref in sorted(file for file in refs.rglob("*") if file.is_file()):
            by_commit.setdefault(ref.read_text().strip(), []).append(str(ref.relative_to(refs)))
        for snapshot in sorted((folder / "snapshots").glob("*")):
            files = [file for file in snapshot.rglob("*") if file.is_file()]
            pinned = ModelName(repo, snapshot.name)
            yield Kept(
                repo,
                snapshot.name,
                tuple(by_commit.get(snapshot.name, [])),
                sum(file.stat().st_size for file in files),
                (whole(place, pinned) or usable(place, pinned)) is not None,
            )


def remove(place: Place, name: ModelName) -> int:
    """Take a repository out of the cache, all revisions of it; returns the bytes that are free by that.
    Raises :class:`HubError` where it is not there."""
    folder = place.repo(name)
    if not folder.is_dir():
        raise HubError(f"{name.repo} is not in {place.cache}")
    nbytes = sum(
        file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
    )
    shutil.rmtree(folder)
    forget(place, name)
    return nbytes


def forget(place: Place, name: ModelName) -> None:
    """Nothing of a repository is left, as far as that can be done."""
    shutil.rmtree(place.repo(name), ignore_errors=True)
    shutil.rmtree(place.cache / ".locks" / name.folder, ignore_errors=True)
    for record in place.records.glob(f"{name.folder}@*.json"):
        record.unlink(missing_ok=True)


def _has_weights(snapshot: Path) -> bool:
    if (snapshot / WEIGHTS).is_file():
        return True
    try:
        names = shards_of(json.loads((snapshot / WEIGHTS_INDEX).read_text()))
    except (OSError, ValueError, AttributeError):
        return False
    return bool(names) and all((snapshot / name).is_file() for name in names)


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, for whoever reads it meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=".")
    try:
        with os.fdopen(handle, "w") as open_file:
            open_file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, file)
    except OSError:
        with suppress(OSError):
            os.unlink(scratch)
        raise


def _token(environment: Mapping[str, str], home: Path) -> str:
    """Of the environment, or of who has logged in with huggingface_hub's command."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := environment.get(name, "").strip():
            return token
    if _is_true(environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return ""
    try:
        return _expanded(environment.get("HF_TOKEN_PATH") or str(home / "token")).read_text().strip()
    except (OSError, ValueError):
        return ""


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in _TRUE


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path))).absolute()
