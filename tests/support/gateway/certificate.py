"""Certificates that tests make for themselves, with the openssl of the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    command: list[str | Path] = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key
