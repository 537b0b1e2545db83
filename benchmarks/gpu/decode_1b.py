"""Batch-1 decode at the shape of Llama 1B."""

from gpu.decode import measure

if __name__ == "__main__":
    measure("1b")
