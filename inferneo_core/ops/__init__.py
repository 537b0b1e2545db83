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
    selected = torch.device(device)
    if selected.type == "cuda" and selected.index is not None and selected.index >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device is {device}, but this machine has {torch.cuda.device_count()} CUDA GPUs (they count from cuda:0)"
        )
    return selected


def select_ops(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_threads: int | None = None,
    batch_invariant: bool | None = None,
) -> Ops:
    """The backend of an EngineConfig.ops; "auto" is the device's own: "cpu" on the CPU, "triton" on CUDA.

    Raises:
        ConfigError: the backend does not run on the device.
        BackendUnavailable: the compiled extension or Triton is missing, or the device cannot run the backend.
    """
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "triton"
    if name == "torch":
        return TorchOps(dtype, device)
    if name == "cpu":
        if device.type != "cpu":
            raise ConfigError(f"ops is 'cpu' but device is {device} (use device='cpu', or ops='torch')")
        return CpuOps(num_threads)
    if name == "triton":
        return _triton_ops(dtype, device, bool(batch_invariant))
    raise ConfigError(f"ops is {name!r}; it is one of 'torch', 'cpu', 'triton' or 'auto'")


def _triton_ops(dtype: torch.dtype, device: torch.device, batch_invariant: bool) -> Ops:
    try:
        # Not at the top: Triton is there only where there is a GPU, and takes a second to import.
        from inferneo_core.ops.triton_ops import TritonOps
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise BackendUnavailable(
            "ops is 'triton', but Triton is not installed (pip install triton, or use ops='torch')"
        ) from error
    return TritonOps(dtype, device, batch_invariant=batch_invariant)
