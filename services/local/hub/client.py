"""The talk with the Hub, by huggingface_hub: what a repository holds, and its files into the cache.

A file comes into ``blobs/DIGEST.incomplete``, which a later call goes on with; only what has the digest that
the Hub told becomes a blob, and is linked into its snapshot. (huggingface_hub itself begins a file anew, and
looks at its length alone.) Owns that, and what the Hub's refusals are in words.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from microserve.services.local.hub.files import Listing, RemoteFile
from microserve.services.local.hub.name import HubError, ModelName, NotReached
from microserve.services.local.hub.place import Place

INSTALL = "pip install '.[hub]' in a checkout, or pip install huggingface_hub"
TIMEOUT_S = 10.0
"""For the answer to begin; huggingface_hub's own for the rest (``HF_HUB_DOWNLOAD_TIMEOUT``)."""
CHUNK_NBYTES = 1 << 20
"""As much is lost, at most, when a fetch breaks off."""
NUM_RETRIES = 5
"""Of a file, one after the other without a byte."""
PAUSE_S = 1.0

Progress = Callable[[int], None]
"""Called with how many bytes of a file are here."""


class HubClient:
    """For one repository at one revision. Methods raise :class:`HubError`, and take long."""

    def __init__(self, place: Place, name: ModelName, pause_s: float = PAUSE_S) -> None:
        try:
            import huggingface_hub  # noqa: F401
        except ModuleNotFoundError:
            raise HubError(f"to fetch {name} by its name huggingface_hub is needed: {INSTALL}") from None
        from huggingface_hub.utils import logging
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        disable_progress_bars()
        self._place, self._name, self._pause_s = place, name, pause_s
        self._token: str | bool = place.token or False
        self._headers = build_hf_headers(token=self._token, library_name="microserve")
        self._headers["Accept-Encoding"] = "identity"  # a part of a packed answer is no part of the file

    def listing(self) -> Listing:
        from huggingface_hub import HfApi

        name = self._name
        with self._told():
            info = HfApi(endpoint=self._place.endpoint, token=self._token).model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT_S
            )
        if not info.sha:
            raise HubError(f"{self._place.endpoint} names no commit of {name}")
        files = {}
        for each in info.siblings or []:
            digest = each.lfs.sha256 if each.lfs is not None else each.blob_id or ""
            nbytes = each.lfs.size if each.lfs is not None else each.size or 0
            files[each.rfilename] = RemoteFile(each.rfilename, nbytes, digest)
        return Listing(info.sha, files)

    def partial_nbytes(self, file: RemoteFile) -> int:
        """How much of it is here already, whole or not."""
        blob = self._place.repo(self._name) / "blobs" / file.digest
        for place in (blob, _incomplete(blob)) if file.digest else ():
            if place.is_file():
                return min(place.stat().st_size, file.nbytes)
        return 0

    def fetch(self, commit: str, file: RemoteFile, progress: Progress) -> Path:
        """The file in the snapshot of ``commit``."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        place, repo = self._place, self._name.repo
        target = place.snapshot(self._name, commit) / file.path
        if target.is_file() and target.stat().st_size == file.nbytes:
            return target
        url = hf_hub_url(repo, file.path, revision=commit, endpoint=place.endpoint)
        with self._told():
            metadata = get_hf_file_metadata(url, token=self._token, endpoint=place.endpoint)
            etag = metadata.etag or ""
            is_odd = not etag or "/" in etag or metadata.size not in (None, file.nbytes)
            if is_odd or (len(file.digest) == 64 and etag != file.digest):
                raise HubError(f"{place.endpoint} says two things of what {file.path} of {repo} is")
            blob = place.repo(self._name) / "blobs" / etag
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists():
                self._fill(url, metadata, blob, file, progress)
            pointer = hf_hub_download(
                repo,
                file.path,
                revision=commit,
                cache_dir=place.cache,
                token=self._token,
                endpoint=place.endpoint,
            )
        return Path(pointer)

    def _fill(self, url: str, metadata: Any, blob: Path, file: RemoteFile, progress: Progress) -> None:
        """``blob`` from where the metadata of ``url`` says; what has come stays when it breaks off."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import HfHubHTTPError

        fruitless = 0
        with _Partial(_incomplete(blob), file, progress) as partial:
            progress(partial.nbytes)  # which may raise, as at any piece
            while partial.nbytes < file.nbytes:
                before = partial.nbytes
                try:
                    self._go_on(url, metadata.location, partial)
                except HfHubHTTPError as error:
                    # A link to the store is good for an hour or so; a new one is asked for once.
                    if error.response.status_code not in (401, 403) or metadata.location == url:
                        raise
                    fruitless = fruitless + 1 if partial.nbytes == before else 0
                    if fruitless > 1:
                        raise
                    metadata = get_hf_file_metadata(url, token=self._token, endpoint=self._place.endpoint)
                # huggingface_hub closes the client that all threads share where one of them cannot connect.
                except (_transport_error(), RuntimeError):
                    fruitless = fruitless + 1 if partial.nbytes == before else 0
                    if fruitless > NUM_RETRIES:
                        raise
                    time.sleep(self._pause_s)
        if (found := digest_of(_incomplete(blob), blob.name)) != blob.name:
            _incomplete(blob).unlink()
            raise HubError(
                f"{file.path} of {self._name} came damaged (its digest is {found[:12]}..., not "
                f"{blob.name[:12]}...) and was thrown away: ask again"
            )
        os.replace(_incomplete(blob), blob)

    def _go_on(self, url: str, location: str, partial: _Partial) -> None:
        """One answer, from where ``partial`` ends."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils._http import hf_raise_for_status

        headers = dict(self._headers)
        if urlsplit(location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the store of large files has links of its own
        if partial.nbytes:
            headers["Range"] = f"bytes={partial.nbytes}-"
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", location, headers=headers, timeout=timeout_s, follow_redirects=True
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.status_code != 206:
                partial.begin_anew()
            for chunk in response.iter_bytes(CHUNK_NBYTES):
                partial.write(chunk)
                if partial.is_over:  # whatever else comes, it is not this file
                    return

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What huggingface_hub raises, in a sentence."""
        from huggingface_hub import errors

        name, endpoint = self._name, self._place.endpoint
        try:
            yield
        except errors.GatedRepoError:
            how = "the token of HF_TOKEN has no access" if self._place.token else "set HF_TOKEN"
            raise HubError(
                f"{name.repo} is gated: accept its terms at {endpoint}/{name.repo}, with the account of your "
                f"token ({how})"
            ) from None
        except errors.RevisionNotFoundError:
            raise HubError(f"{name.repo} has no revision {name.revision!r}") from None
        except errors.RepositoryNotFoundError:
            perhaps = (
                "the token of HF_TOKEN may not see it"
                if self._place.token
                else "a private one needs HF_TOKEN"
            )
            raise HubError(f"{endpoint} has no model {name.repo}, or {perhaps}") from None
        except errors.LocalEntryNotFoundError as error:  # it was there a moment ago
            raise NotReached(f"{endpoint} cannot be reached for {name} ({_line(error)})") from None
        except errors.EntryNotFoundError as error:
            raise HubError(f"{name} lacks a file that it lists: {_line(error)}") from None
        except errors.HfHubHTTPError as error:
            raise self._refused(error) from None
        except errors.OfflineModeIsEnabled:
            raise NotReached(f"HF_HUB_OFFLINE forbids to ask {endpoint} for {name}") from None
        except _transport_error() as error:
            raise NotReached(
                f"{endpoint} cannot be reached for {name} ({_line(error)}); what has come is kept"
            ) from None
        except errors.FileMetadataError as error:
            raise HubError(f"{endpoint} does not answer as the Hub does: {_line(error)}") from None

    def _refused(self, error: Any) -> HubError:
        status, endpoint = error.response.status_code, self._place.endpoint
        if status == 401:
            return HubError(f"{endpoint} does not know the token of HF_TOKEN")
        if status == 403:
            return HubError(f"{endpoint} forbids {self._name} with this token: {_line(error)}")
        if status == 429 or status >= 500:
            return NotReached(f"{endpoint} is busy or broken ({status}): ask for {self._name} again later")
        return HubError(f"{endpoint} refused {self._name} ({status}): {_line(error)}")


class _Partial:
    """The beginning of a file, which grows."""

    def __init__(self, path: Path, file: RemoteFile, progress: Progress) -> None:
        self._progress, self._end_nbytes = progress, file.nbytes
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in __exit__)
        self.nbytes = self._file.tell()
        if self.is_over:
            self.begin_anew()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def is_over(self) -> bool:
        """More has come than there is of the file."""
        return self.nbytes > self._end_nbytes

    def write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            written = self._file.write(rest) or 0
            self.nbytes += written
            rest = rest[written:]
        self._progress(self.nbytes)

    def begin_anew(self) -> None:
        """Not every server goes on where it is asked to."""
        self._file.truncate(0)
        self.nbytes = 0


def _transport_error() -> Any:
    """What huggingface_hub raises where there is no answer: of httpx, whichever it uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def digest_of(path: Path, like: str) -> str:
    """By the rule that ``like`` was made by (SHA-256, or a blob's id in git); ``like`` itself where that is
    not known."""
    if len(like) == 64:
        digest = hashlib.sha256()
    elif len(like) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return like
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_NBYTES):
            digest.update(piece)
    return digest.hexdigest()


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
