"""InferneoClient and AsyncInferneoClient: the clients of the openai SDK, at home on an Inferneo server.

Whatever their parents can do, they do. What differs stands in `client` (addresses, keys, proxies), `parameters` (the
engine's own sampling parameters), `streams` (a stream that is left is closed, one cut short raises), `exchange` and
`websocket`.
"""

from inferneo.client.client import AsyncInferneoClient, InferneoClient
from inferneo.client.streams import AsyncInferneoStream, InferneoStream

__all__ = ["AsyncInferneoClient", "AsyncInferneoStream", "InferneoClient", "InferneoStream"]
