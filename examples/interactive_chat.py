"""Talk with the model in the terminal."""

from __future__ import annotations

from openai import OpenAIError
from options import parse

from inferneo import InferneoClient


def interactive_chat(client: InferneoClient, model: str, max_tokens: int) -> None:
    """Ask for a line, stream the answer to it, until the user says quit or ends the input."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    print("Chat with Inferneo (type 'quit' to exit)")
    print("-" * 50)
    while True:
        try:
            user_input = input("\nYou: ")
        except EOFError:
            return
        if user_input.lower() == "quit":
            return
        messages.append({"role": "user", "content": user_input})
        print("Assistant: ", end="", flush=True)
        try:
            stream = client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=0.7, stream=True
            )
            answer = ""
            for chunk in stream:
                if chunk.choices[0].delta.content is not None:
                    answer += chunk.choices[0].delta.content
                    print(chunk.choices[0].delta.content, end="", flush=True)
            messages.append({"role": "assistant", "content": answer})
        except OpenAIError as error:
            messages.pop()  # a question without its answer: most chat templates want the roles to alternate
            print(f"\nError: {error}")


if __name__ == "__main__":
    options = parse(__doc__)
    interactive_chat(InferneoClient(options.base_url), options.model, options.max_tokens)
