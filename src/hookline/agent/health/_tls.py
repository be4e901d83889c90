"""TLS of a check: contexts are dear (the system's certificates take milliseconds to read), so each is made once per file."""

from __future__ import annotations

import os
import ssl

from hookline.agent.health.checks import Backend, CheckError
from hookline.model import HealthCheck

_MOST = 64
_contexts: dict[tuple[object, ...], ssl.SSLContext] = {}


def context(how: HealthCheck, *protocols: str) -> ssl.SSLContext:
    """The context for a check, made again when its CA file changed.

    Raises:
        CheckError: The CA file cannot be read, or has no certificate.
    """
    tls = how.tls
    file = tls.ca_file if tls else None
    insecure = bool(tls and tls.insecure_skip_verify)
    try:
        found = os.stat(file) if file else None
        key = (file, found and (found.st_mtime_ns, found.st_size, found.st_ino), insecure, protocols)
        known = _contexts.get(key)
        if known is None:
            known = (
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                if insecure
                else ssl.create_default_context(cafile=file)
            )
            if insecure:
                known.check_hostname = False
                known.verify_mode = ssl.CERT_NONE
            if protocols:
                known.set_alpn_protocols(list(protocols))
            while len(_contexts) >= _MOST:
                del _contexts[next(iter(_contexts))]
            _contexts[key] = known
    except (OSError, ssl.SSLError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckError("ca-file", f"{file}: {reason}") from None
    return known


def server_name(how: HealthCheck, backend: Backend) -> str:
    """The name that the server is asked for (SNI) and that its certificate must have."""
    if how.tls and how.tls.server_name:
        return how.tls.server_name
    if how.host:
        host = how.host
        if not host.startswith("["):
            return host.partition(":")[0] if host.count(":") == 1 else host
        return host[1:].partition("]")[0]
    return str(backend.address)
