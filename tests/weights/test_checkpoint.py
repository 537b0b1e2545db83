"""What both formats share: views, releasing pages, errors, and the peak of memory while a model is converted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inferneo_core.errors import CorruptWeights, ModelNotFound, UnsupportedModel
from inferneo_core.weights import Checkpoint, open_checkpoint
from inferneo_core.weights.checkpoint import MappedFile
from inferneo_core.weights.hub import ModelFiles


def saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return open_checkpoint(ModelFiles("safetensors", directory))


def quantised(directory: Path) -> Checkpoint:
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((5, 2 * 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", np.ones((500, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(ModelFiles("gguf", directory, directory / "model.gguf"))


def resident_kib(path: Path) -> int:
    """KiB of a mapped file that count as this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


def test_dtype_is_that_of_most_matrix_bytes_and_none_when_quantised(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(5, 123).bfloat16(), "b": torch.ones(7, 9).half(), "norm": torch.ones(9999)}
    assert saved(tmp_path, tensors).dtype == torch.bfloat16
    assert saved(tmp_path, {"norm": torch.ones(5)}).dtype is None
    assert quantised(tmp_path).dtype is None


def test_num_bytes_counts_what_is_stored(tmp_path: Path) -> None:
    assert saved(tmp_path, {"a": torch.ones(5, 123).bfloat16(), "b": torch.ones(7)}).num_bytes == 5 * 123 * 2 + 7 * 4
    assert quantised(tmp_path).num_bytes == 5 * 2 * 34 + 500 * 64 * 4 + 64 * 4


def test_metadata_is_empty_for_safetensors(tmp_path: Path) -> None:
    assert saved(tmp_path, {"a": torch.ones(5)}).metadata() == {}
    assert quantised(tmp_path).metadata()["general.architecture"] == "llama"


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"a": torch.ones(5)})
    for read in (checkpoint.shape, checkpoint.segment, checkpoint.tensor, checkpoint.release):
        with pytest.raises(CorruptWeights, match=r"has no tensor model\.norm\.weight among its 1"):
            read("model.norm.weight")


def test_segment_refuses_what_is_no_matrix(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"vector": torch.ones(5), "cube": torch.ones(2, 3, 4)})
    with pytest.raises(CorruptWeights, match=r"vector has shape \[5\]; it must have 2 dimensions"):
        checkpoint.segment("vector")
    with pytest.raises(CorruptWeights, match=r"cube has shape \[2, 3, 4\]"):
        checkpoint.segment("cube")


def test_tensor_refuses_what_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight is stored as Q8_0; this tensor must be"):
        quantised(tmp_path).tensor("model.embed_tokens.weight")


def test_release_drops_pages_and_leaves_the_view_valid(tmp_path: Path) -> None:
    expected = torch.randn(1 << 20, 3, generator=torch.Generator().manual_seed(1))
    checkpoint = saved(tmp_path, {"w": expected, "tail": torch.ones(3, 5)})
    view = checkpoint.segment("w").data
    assert torch.equal(view, expected)
    assert resident_kib(tmp_path / "model.safetensors") >= 12 * 1024
    checkpoint.release("w")
    assert resident_kib(tmp_path / "model.safetensors") <= 256
    assert torch.equal(view, expected)


def test_release_of_an_empty_tensor_at_the_end_is_nothing(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(5), "empty": torch.empty(0, 5)}).release("empty")


def test_close_forgets_the_tensors_and_keeps_views_alive(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.arange(15.0).view(5, 3)})
    view = checkpoint.tensor("w")
    checkpoint.close()
    checkpoint.close()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(view, torch.arange(15.0).view(5, 3))
    assert checkpoint.names() == frozenset()
    del view
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_mapped_file_refuses_what_cannot_be_mapped(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("a\0b")):
        with pytest.raises(ModelNotFound, match="cannot be read"):
            MappedFile(path)
    (tmp_path / "empty").touch()
    with pytest.raises(CorruptWeights, match="has 0 bytes"):
        MappedFile(tmp_path / "empty")


CONVERT = """
import sys
from pathlib import Path
import torch
from inferneo_core.weights import open_checkpoint, resolve
from inferneo_core.weights.dequant import dequantize

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def dense(segment):
    out = torch.empty(segment.data.shape[0], 1024, dtype=torch.bfloat16)
    return dequantize(segment.data, segment.quant_type, out) if segment.quant_type else out.copy_(segment.data)

checkpoint = open_checkpoint(resolve(sys.argv[1]))
before = kib("VmHWM")
weights = []
for name in sorted(checkpoint.names()):
    weights.append(dense(checkpoint.segment(name)))
    checkpoint.release(name)
print(sum(weight.nbytes for weight in weights) // 1024, kib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["safetensors", "gguf"])
def test_peak_memory_stays_under_1_3_times_the_converted_weights(tmp_path: Path, format_: str) -> None:
    num_tensors, rows = 24, 4096  # 24 matrices that become 8 MiB of bf16 each
    if format_ == "safetensors":
        save_file(
            {f"w{i}": torch.ones(rows, 1024).bfloat16() for i in range(num_tensors)}, tmp_path / "model.safetensors"
        )
        (tmp_path / "config.json").write_text("{}")
    else:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        for i in range(num_tensors):
            data = np.zeros((rows, 1024 // 32 * 34), np.uint8)
            writer.add_tensor(f"w{i}", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    command = [sys.executable, "-c", CONVERT, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    final_kib, peak_kib = map(int, output.split())
    assert final_kib == num_tensors * rows * 1024 * 2 // 1024
    assert peak_kib < 1.3 * final_kib
