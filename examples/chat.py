"""Stream a chat answer to the terminal."""

from options import parse

from inferneo import InferneoClient


def main() -> None:
    options = parse(__doc__)
    client = InferneoClient(options.base_url)
    stream = client.chat.completions.create(
        model=options.model,
        messages=[{"role": "user", "content": "Write a short story about a robot."}],
        max_tokens=options.max_tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices[0].delta.content is not None:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
