"""The gateway's certificate: read at the start, and again when asked, without a restart.

Owns the TLS context. Connections that are open keep the certificate that they began with.
"""

from __future__ import annotations

import ssl

import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError

_logger = structlog.get_logger()


class Certificate:
    """A certificate with its key, as two PEM files. Raises :class:`ConfigError` naming the setting."""

    def __init__(self, cert: str, key: str) -> None:
        self._files = cert, key
        self.context = _context(cert, key)

    def reload(self) -> None:
        """Show what the files hold now to whoever connects from now on; wrong ones change nothing."""
        try:
            _context(*self._files)  # first where nobody uses it: half a change would refuse everybody
            self.context.load_cert_chain(*self._files, password=_no_password)
        except (ConfigError, OSError) as error:
            _logger.error(log.CERTIFICATE_REJECTED, path=self._files[0], error=str(error))
        else:
            _logger.info(log.CERTIFICATE_READ, path=self._files[0])


def _context(cert: str, key: str) -> ssl.SSLContext:
    for field, path in (("gateway.tls_cert", cert), ("gateway.tls_key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{field}: cannot read {path}: {error.strerror}", field=field) from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except ssl.SSLError:
        raise ConfigError(f"gateway.tls_cert: no certificate in {cert}", field="gateway.tls_cert") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        what = "the key of" if error.reason == "KEY_VALUES_MISMATCH" else "a private key in PEM for"
        raise ConfigError(f"gateway.tls_key: {key} is not {what} {cert}", field="gateway.tls_key") from None
    return context


def _no_password() -> str:
    """OpenSSL would ask for it on the terminal, and a service would stand."""
    raise ConfigError("gateway.tls_key: keys with a password are not supported", field="gateway.tls_key")
