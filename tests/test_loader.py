"""Loading: the peak of memory stays near the weights' final size."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import sys
from inferneo_core import Engine

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
engine = Engine(sys.argv[1], dtype=sys.argv[2], ops="torch", num_threads=1, max_model_len=1024)
model = engine._runner.model
linears = [model.embed]
for layer in model.layers:
    linears += layer.qkv, layer.out, layer.gate_up, layer.down
print((status("VmHWM") - before) / sum(linear.weight.nbytes for linear in linears))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_peaks_below_1_3_times_the_weights(dtype, default_model):
    command = [sys.executable, "-c", MEASURE, str(default_model), dtype]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 1.0 < ratio < 1.3
