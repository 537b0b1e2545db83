"""Hand each token of a stream to a callback."""

from __future__ import annotations

import time

from options import parse

from inferneo import InferneoClient


class StreamingCallback:
    """Prints the tokens and, at the end, how fast they came."""

    def __init__(self) -> None:
        self.full_response = ""
        self.tokens_received = 0
        self.start_time = time.perf_counter()

    def on_token(self, token: str) -> None:
        """Called for each token received."""
        self.full_response += token
        self.tokens_received += 1
        print(token, end="", flush=True)

    def on_complete(self) -> None:
        """Called when streaming is complete."""
        generation_time = time.perf_counter() - self.start_time
        print("\n\nStreaming completed:")
        print(f"Total tokens: {self.tokens_received}")
        print(f"Generation time: {generation_time:.2f} seconds")
        print(f"Tokens per second: {self.tokens_received / generation_time:.2f}")


def main() -> None:
    options = parse(__doc__)
    client = InferneoClient(options.base_url)
    callback = StreamingCallback()
    stream = client.chat.completions.create(
        model=options.model,
        messages=[{"role": "user", "content": "Write a poem about technology."}],
        max_tokens=options.max_tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices[0].delta.content is not None:
            callback.on_token(chunk.choices[0].delta.content)
    callback.on_complete()


if __name__ == "__main__":
    main()
