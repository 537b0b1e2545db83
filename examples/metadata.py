"""Number each token of a stream, and sum up at its end. One token is one chunk, so counting chunks counts tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable

from openai.types.chat import ChatCompletionChunk
from options import parse

from inferneo import InferneoClient


def process_stream_with_metadata(stream: Iterable[ChatCompletionChunk]) -> str:
    """Print the stream with its token numbers; return the whole text."""
    full_response = ""
    tokens_generated = 0
    start_time = time.perf_counter()
    for chunk in stream:
        content = chunk.choices[0].delta.content
        if content is not None:
            full_response += content
            tokens_generated += 1
            print(f"[Token {tokens_generated}] {content}", end="", flush=True)
    generation_time = time.perf_counter() - start_time

    print("\n\nGeneration completed:")
    print(f"Total tokens: {tokens_generated}")
    print(f"Generation time: {generation_time:.2f} seconds")
    print(f"Tokens per second: {tokens_generated / generation_time:.2f}")
    return full_response


def main() -> None:
    options = parse(__doc__)
    client = InferneoClient(options.base_url)
    stream = client.chat.completions.create(
        model=options.model,
        messages=[{"role": "user", "content": "Explain machine learning step by step."}],
        max_tokens=options.max_tokens,
        stream=True,
    )
    process_stream_with_metadata(stream)


if __name__ == "__main__":
    main()
