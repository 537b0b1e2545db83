"""Measure a stream as its reader sees it: time to first token, tokens per second, the interval between tokens."""

from __future__ import annotations

import time
from collections import deque

from options import parse

from inferneo import InferneoClient


class StreamingMetrics:
    """The clock of one stream. `inferneo_core.StreamMetrics` is the same, with percentiles."""

    def __init__(self) -> None:
        self.start_time = self.last_token_time = time.perf_counter()
        self.time_to_first_token = 0.0
        self.tokens_received = 0
        self.token_times: deque[float] = deque(maxlen=100)

    def on_token(self) -> None:
        """Record one token's time."""
        now = time.perf_counter()
        if self.tokens_received == 0:
            self.time_to_first_token = now - self.start_time
        else:
            self.token_times.append(now - self.last_token_time)
        self.tokens_received += 1
        self.last_token_time = now

    def report(self) -> str:
        """The figures, a line each."""
        total_time = self.last_token_time - self.start_time
        interval = sum(self.token_times) / len(self.token_times) if self.token_times else 0.0
        return (
            f"Total tokens: {self.tokens_received}\n"
            f"Total time: {total_time:.2f} seconds\n"
            f"Time to first token: {self.time_to_first_token * 1000:.2f} ms\n"
            f"Tokens per second: {self.tokens_received / total_time:.2f}\n"
            f"Average token interval: {interval * 1000:.2f} ms"
        )


def main() -> None:
    options = parse(__doc__)
    client = InferneoClient(options.base_url)
    metrics = StreamingMetrics()
    stream = client.completions.create(
        model=options.model,
        prompt="Explain the benefits of streaming responses.",
        max_tokens=options.max_tokens,
        temperature=0.7,
        stream=True,
    )
    for chunk in stream:
        metrics.on_token()
        print(chunk.choices[0].text, end="", flush=True)
    print(f"\n\nPerformance metrics:\n{metrics.report()}")


if __name__ == "__main__":
    main()
