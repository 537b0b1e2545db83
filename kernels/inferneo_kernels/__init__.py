"""GPU kernels: one file a kernel family, holding its Triton kernel and its launcher. Imports torch and triton only."""
