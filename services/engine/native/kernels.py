"""Which native kernels ``engine.cpu_kernels`` means on this machine, and what is said where none are."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from microserve.kernels.cpu.library import Library, choose_variant, library
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings

_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Kernels:
    library: Library
    variant: str


def choose_kernels(settings: Settings) -> Kernels | None:
    """None: transformers computes. May compile for half a minute.

    Raises :class:`ConfigError` where a variant, or int8 weights, were asked for and cannot be had.
    """
    wanted = settings.engine.cpu_kernels
    if settings.engine.device != "cpu" or wanted == "transformers":
        return None
    try:
        found = library(_tell)
        return Kernels(found, choose_variant(found, wanted, settings.model.dtype, settings.model.weights))
    except KernelUnavailable as error:
        go_without(settings, error)
        return None


def go_without(settings: Settings, error: KernelUnavailable) -> None:
    """transformers computes instead. Raises :class:`ConfigError` where that is not what was asked for."""
    wanted, weights = settings.engine.cpu_kernels, settings.model.weights
    if weights != "dtype":
        raise ConfigError(
            f"model.weights {weights!r} cannot be had: {error}", field="model.weights"
        ) from None
    if wanted != "auto":
        raise ConfigError(
            f"engine.cpu_kernels {wanted!r} cannot be had: {error}", field="engine.cpu_kernels"
        ) from None
    _logger.warning(log.KERNEL_MISSING, kernel="cpu_step", instead="transformers", detail=str(error))


def _tell(what: str) -> None:
    _logger.info(log.KERNEL_AWAITED, kernel="cpu_step", detail=what)
