"""Whether a server that the environment names is there, asked before anything waits for it."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request

from lolcats_common.errors import Unavailable

SECONDS = 5.0
HEALTH = "/health"


def require_answer(name: str, address: str, variable: str, without: str) -> None:
    """Ask a server once; any answer will do, also that it wants a login.

    Args:
        variable: of the environment, which names it. without: what happens where that is unset.

    Raises:
        Unavailable: there is no answer; the message says what to do.
    """
    try:
        urllib.request.urlopen(address.rstrip("/") + HEALTH, timeout=SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # whoever talks to the server knows which certificates to take
        raise Unavailable(
            f"{name} at {address} does not answer ({getattr(reason, 'strerror', None) or reason}); "
            f"start it (`make serve`), correct {variable}, or unset it: {without}"
        ) from None
