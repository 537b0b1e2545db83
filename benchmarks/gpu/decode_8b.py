"""Batch-1 decode at the shape of Llama 8B."""

from inferneo_benchmarks.gpu.decode import measure

if __name__ == "__main__":
    measure("llama-3.1-8b")
