"""Which backend runs on which device."""

from __future__ import annotations

import torch

from inferneo_core.errors import BackendUnavailable, ConfigError
from inferneo_core.ops.base import Ops
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps


def select_device(device: str) -> torch.device:
    """The torch device of an EngineConfig.device; "auto" is the GPU where there is one.

    Raises:
        BackendUnavailable: a GPU was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device is {device}, but torch {torch.__version__} finds no CUDA GPU (use device='cpu')"
        )
    return torch.device(device)


def select_ops(name: str, device: torch.device, dtype: torch.dtype, num_threads: int | None = None) -> Ops:
    """The backend of an EngineConfig.ops; "auto" is the device's own: "cpu" on the CPU, "torch" on CUDA.

    Raises:
        ConfigError: the backend does not run on the device.
        BackendUnavailable: the compiled extension is missing, or the backend is not part of this version.
    """
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "torch"
    if name == "torch":
        return TorchOps(dtype, device)
    if name == "cpu":
        if device.type != "cpu":
            raise ConfigError(f"ops is 'cpu' but device is {device} (use device='cpu', or ops='torch')")
        return CpuOps(dtype, num_threads=num_threads)
    raise BackendUnavailable(f"ops is {name!r}; this version has 'cpu' and 'torch' (use ops='auto')")
