"""What of Inferneo speaks to the network and the terminal. The engine itself is `inferneo_core`.

Importing this package loads neither torch, nor the engine, nor the openai SDK; the clients come with their first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferneo.client import AsyncInferneoClient, InferneoClient

__all__ = ["AsyncInferneoClient", "InferneoClient", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("AsyncInferneoClient", "InferneoClient"):
        from inferneo import client

        return getattr(client, name)
    raise AttributeError(f"module 'inferneo' has no attribute {name!r}")
