"""Show a stream as a progress bar. It ends at exactly the number of tokens, because one token is one chunk."""

from __future__ import annotations

from options import parse
from tqdm import tqdm

from inferneo import InferneoClient


def stream_with_progress_bar(client: InferneoClient, model: str, prompt: str, max_tokens: int) -> str:
    """Generate behind a bar; return the whole text."""
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0.7, stream=True)
    full_response = ""
    with tqdm(total=max_tokens, desc="Generating", unit="tokens") as bar:
        for chunk in stream:
            full_response += chunk.choices[0].text
            bar.update(1)
            bar.set_description(f"Generated {bar.n} tokens")
    return full_response


if __name__ == "__main__":
    options = parse(__doc__)
    response = stream_with_progress_bar(
        InferneoClient(options.base_url), options.model, "Explain the concept of neural networks.", options.max_tokens
    )
    print(f"\nFinal response: {response}")
