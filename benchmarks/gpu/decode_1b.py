"""Batch-1 decode at the shape of Llama 1B."""

from inferneo_benchmarks.gpu.decode import measure

if __name__ == "__main__":
    measure("llama-3.2-1b")
