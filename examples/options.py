"""The options that every example takes: where the server is and which model to ask."""

from __future__ import annotations

import argparse
import os


def parse(description: str | None) -> argparse.Namespace:
    """Read --base-url, --model and --max-tokens; the first two have environment variables too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-url", default=os.environ.get("INFERNEO_BASE_URL", "http://localhost:8000"))
    parser.add_argument("--model", default=os.environ.get("INFERNEO_MODEL", "smollm2-135m-instruct"))
    parser.add_argument("--max-tokens", type=int, default=200)
    return parser.parse_args()
