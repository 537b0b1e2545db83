"""Stream the continuation of a text to the terminal."""

from options import parse

from inferneo import InferneoClient


def main() -> None:
    options = parse(__doc__)
    client = InferneoClient(options.base_url)
    stream = client.completions.create(
        model=options.model,
        prompt="Explain quantum computing in detail:",
        max_tokens=options.max_tokens,
        temperature=0.7,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
