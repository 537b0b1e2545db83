"""Stream, and try again when the server fails. A stream that is cut off raises; it never looks finished."""

from __future__ import annotations

import sys
import time

from openai import APIConnectionError, APIStatusError, OpenAIError
from options import parse

from inferneo import InferneoClient


def may_retry(error: OpenAIError) -> bool:
    """Whether the same request may succeed later: not if the server has called the request itself wrong."""
    if isinstance(error, APIStatusError):
        return error.status_code == 429 or error.status_code >= 500
    return isinstance(error, APIConnectionError)


def robust_streaming(client: InferneoClient, model: str, prompt: str, max_tokens: int, max_retries: int = 3) -> str:
    """Stream a completion with up to `max_retries` attempts; return the whole text."""
    for attempt in range(1, max_retries + 1):
        full_response = ""
        try:
            stream = client.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0.7, stream=True
            )
            for chunk in stream:
                full_response += chunk.choices[0].text
                print(chunk.choices[0].text, end="", flush=True)
            return full_response
        except OpenAIError as error:
            print(f"\nAttempt {attempt} failed: {error}", file=sys.stderr)
            if attempt == max_retries or not may_retry(error):
                raise
            time.sleep(2 ** (attempt - 1))  # exponential backoff
    raise ValueError(f"max_retries is {max_retries}; it is at least 1")


if __name__ == "__main__":
    options = parse(__doc__)
    # The client's own retries are off: this program does them.
    client = InferneoClient(options.base_url, max_retries=0)
    try:
        robust_streaming(client, options.model, "Write a short story about space exploration.", options.max_tokens)
    except OpenAIError:
        sys.exit("All attempts failed")
    print()
