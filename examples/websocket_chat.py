"""Stream a chat answer over a WebSocket, with nothing but the `websockets` package."""

from __future__ import annotations

import asyncio
import json

from options import parse
from websockets.asyncio.client import connect


async def stream_with_websocket(base_url: str, model: str, max_tokens: int) -> str:
    """Print the answer as it comes; return it whole."""
    uri = base_url.replace("http", "ws", 1) + "/v1/chat/completions"
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "max_tokens": max_tokens,
    }
    full_response = ""
    async with connect(uri) as websocket:
        await websocket.send(json.dumps(request))
        async for message in websocket:
            data = json.loads(message)
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            choice = data["choices"][0]
            content = choice["delta"].get("content", "")
            full_response += content
            print(content, end="", flush=True)
            if choice.get("finish_reason") is not None:
                break
    print()
    return full_response


if __name__ == "__main__":
    options = parse(__doc__)
    asyncio.run(stream_with_websocket(options.base_url, options.model, options.max_tokens))
