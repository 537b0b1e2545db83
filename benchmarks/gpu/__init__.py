"""The parts of benchmarks/gpu_check.sh: what can only be proved and measured on a GPU."""
