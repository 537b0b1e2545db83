"""What the kernels keep keys and values in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inferneo_core.errors import ConfigError


def test_int8_cache_is_refused_with_its_remedy(tiny_engine: Any, device: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'int8'; ops='triton' .* ops='cpu' or 'torch'"):
        tiny_engine(ops="triton", device=str(device), dtype="float32", kv_cache_dtype="int8")
