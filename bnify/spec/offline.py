"""No network: whatever a registry tries, it finds the local cache or nothing."""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@contextmanager
def offline() -> Iterator[list[str]]:
    """Refuse name look-ups by this thread, and tell Hugging Face's libraries to stay offline.

    Every Python HTTP client goes through ``socket.getaddrinfo``; compiled downloaders obey the
    environment variables. Yields the list that the refused host names are put in.
    """
    hosts: list[str] = []
    thread = threading.get_ident()
    look_up = socket.getaddrinfo

    def refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return look_up(host, *args, **kwargs)
        hosts.append(str(host))
        raise socket.gaierror(socket.EAI_FAIL, "bnify downloads nothing without --allow-download")

    constants: Any = None
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants  # before the variables: it reads them at import
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    hub_offline = getattr(constants, "HF_HUB_OFFLINE", None)
    try:
        os.environ.update(dict.fromkeys(_VARIABLES, "1"))
        socket.getaddrinfo = refuse
        if hub_offline is not None:
            constants.HF_HUB_OFFLINE = True
        yield hosts
    finally:
        if hub_offline is not None:
            constants.HF_HUB_OFFLINE = hub_offline
        socket.getaddrinfo = look_up
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
