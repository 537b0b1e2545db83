"""The openai SDK that is installed, and the httpx that it speaks: `httpx` up to 2.x, `httpx2` from 3.0 on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import openai
except ModuleNotFoundError as error:
    if error.name != "openai":
        raise
    raise ModuleNotFoundError(
        "InferneoClient needs the openai SDK (pip install 'inferneo[client]')", name="openai"
    ) from None

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    _major = int(openai.__version__.partition(".")[0])
    if _major not in (2, 3):
        raise ImportError(
            f"openai is {openai.__version__}; InferneoClient needs 2.x or 3.x (pip install 'inferneo[client]')"
        )
    httpx = import_module("httpx2" if _major == 3 else "httpx")

__all__ = ["httpx", "openai"]
