"""safetensors files and shards: read as the safetensors library reads them, refused where it refuses and beyond."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from inferneo_core.errors import CorruptWeights, ModelError, ModelNotFound, UnsafeWeights, UnsupportedModel
from inferneo_core.weights import Checkpoint, open_checkpoint
from inferneo_core.weights.hub import ModelFiles


def open_directory(directory: Path) -> Checkpoint:
    return open_checkpoint(ModelFiles("safetensors", directory))


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model.embed_tokens.weight": torch.randn(123, 5, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(5, 123, generator=generator).half(),
        "model.norm.weight": torch.randn(13, generator=generator),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 5),
    }


def raw_file(header: object, num_data_bytes: int = 0, header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + text + bytes(num_data_bytes)


def entry(begin: Any, end: Any, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save_shards(directory: Path, weight_map: dict[str, str] | None = None) -> None:
    tensors = random_tensors()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, directory / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, directory / "model-00002-of-00002.safetensors")
    where = {name: f"model-0000{1 if name in names[:2] else 2}-of-00002.safetensors" for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map or where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.names() == frozenset(expected)
    for name, tensor in expected.items():
        actual = checkpoint.tensor(name)
        assert actual.dtype == tensor.dtype
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(actual, tensor)


def test_single_file_equals_the_library(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(open_directory(tmp_path), load_file(tmp_path / "model.safetensors"))


def test_shards_equal_the_library(tmp_path: Path) -> None:
    save_shards(tmp_path)
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted(tmp_path.glob("*.safetensors")):
        expected |= load_file(shard)
    assert_equal(open_directory(tmp_path), expected)


def test_segments_are_views_of_one_read_only_mapping(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors")
    checkpoint = open_directory(tmp_path)
    first, second = (checkpoint.segment(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert first.data.untyped_storage().data_ptr() == second.data.untyped_storage().data_ptr()
    assert (first.quant_type, first.row_order) == ("", None)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert [line.split()[1] for line in maps] == ["r--s"]


def test_header_of_odd_length_is_read(tmp_path: Path) -> None:
    text = json.dumps({"w": entry(0, 24)}).encode()
    text += b" " * (1 - len(text) % 2)  # odd: no fp32 after it can be aligned
    values = torch.arange(6.0)
    data = len(text).to_bytes(8, "little") + text + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    assert torch.equal(open_directory(tmp_path).segment("w").data, values.view(2, 3))


def test_extra_tensors_of_other_dtypes_disturb_nobody_until_asked_for(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(5, 3), "ids": torch.arange(7), "f8": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_directory(tmp_path)
    assert torch.equal(checkpoint.segment("w").data, torch.ones(5, 3))
    with pytest.raises(UnsupportedModel, match="ids is stored as I64; Inferneo reads F32, F16, BF16"):
        checkpoint.tensor("ids")
    with pytest.raises(UnsupportedModel, match="f8 is stored as F8_E4M3"):
        checkpoint.segment("f8")


BAD_FILES: dict[str, tuple[bytes, type[ModelError], str]] = {
    "empty": (b"", CorruptWeights, "has 0 bytes"),
    "seven bytes": (bytes(7), CorruptWeights, "has 7 bytes; a header takes at least 8"),
    "header past the file": (raw_file({}, header_bytes=3), CorruptWeights, "claims 3 bytes; at most 2"),
    "header of 2**64 - 1": (raw_file({}, header_bytes=2**64 - 1), CorruptWeights, "at most 2 "),
    "no JSON": (raw_file(b"{'a'}"), CorruptWeights, "not valid JSON"),
    "no UTF-8": (raw_file(b'{"\xff":1}'), CorruptWeights, "not valid JSON"),
    "deep JSON": (raw_file(b'{"a":' * 100_000), CorruptWeights, "not valid JSON"),
    "huge integer": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), CorruptWeights, "not valid JSON"),
    "array": (raw_file([1]), CorruptWeights, "a JSON list; it must be an object"),
    "twice": (raw_file(b'{"w":1,"w":2}'), CorruptWeights, "the key 'w' stands twice"),
    "metadata": (raw_file({"__metadata__": {"a": 1}}), CorruptWeights, "must map strings to strings"),
    "no entry": (raw_file({"w": 5}), CorruptWeights, "'w' must have a dtype"),
    "no offsets": (raw_file({"w": {"dtype": "F32", "shape": [1]}}), CorruptWeights, "'w' must have a dtype"),
    "three offsets": (
        raw_file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4),
        CorruptWeights,
        "two data_offsets",
    ),
    "dtype": (raw_file({"w": entry(0, 24, dtype="Q9")}, 24), UnsupportedModel, "w is stored as 'Q9'"),
    "dtype list": (raw_file({"w": entry(0, 24, dtype=["F32"])}, 24), UnsupportedModel, "w is stored as"),
    "negative dimension": (raw_file({"w": entry(0, 24, [-2, -3])}, 24), CorruptWeights, r"shape \[-2, -3\]"),
    "fractional dimension": (raw_file({"w": entry(0, 24, [2.0, 3])}, 24), CorruptWeights, r"shape \[2.0, 3\]"),
    "true dimension": (raw_file({"w": entry(0, 4, [True])}, 4), CorruptWeights, r"shape \[True\]"),
    "huge dimension": (raw_file({"w": entry(0, 24, [2**64])}, 24), CorruptWeights, "integers in"),
    "overflowing product": (
        raw_file({"w": entry(0, 0, [2**62, 4])}),
        CorruptWeights,
        "needs 7.37869762948382e\\+19 bytes",
    ),
    "many dimensions": (raw_file({"w": entry(0, 4, [1] * 9)}, 4), CorruptWeights, "at most 8 dimensions"),
    "bytes": (raw_file({"w": entry(0, 20)}, 20), CorruptWeights, r"shape \[2, 3\] and dtype F32 needs 24 bytes.* 20"),
    "half bytes": (raw_file({"w": entry(0, 1, [3], "F4")}, 1), CorruptWeights, "needs 1.5 bytes"),
    "backwards": (raw_file({"w": entry(24, 0)}, 24), CorruptWeights, "hold -24"),
    "negative offset": (raw_file({"w": entry(-24, 0)}, 24), CorruptWeights, r"data_offsets \[-24, 0\]"),
    "overlap": (raw_file({"a": entry(0, 24), "b": entry(4, 28)}, 28), CorruptWeights, "'b' overlaps"),
    "same place": (raw_file({"a": entry(0, 24), "b": entry(0, 24)}, 24), CorruptWeights, "overlaps"),
    "gap": (raw_file({"a": entry(0, 24), "b": entry(28, 52)}, 52), CorruptWeights, "'b' leaves a gap"),
    "gap at the start": (raw_file({"a": entry(4, 28)}, 28), CorruptWeights, "'a' leaves a gap"),
    "truncated": (raw_file({"a": entry(0, 24)}, 23), CorruptWeights, "its tensors end at byte"),
    "trailing": (raw_file({"a": entry(0, 24)}, 25), CorruptWeights, "its tensors end at byte"),
    "empty inside another": (
        raw_file({"a": entry(0, 24), "b": entry(4, 4, [0])}, 24),
        CorruptWeights,
        "overlaps the tensor before it",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    data, error, message = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        open_directory(tmp_path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(-4, 4)), max_size=2),
    extra_bytes=st.integers(-4, 4),
)
def test_layouts_are_accepted_exactly_when_the_library_accepts_them(
    tmp_path: Path, lengths: list[int], changes: list[tuple[int, int, int]], extra_bytes: int
) -> None:
    header, end = {}, 0
    for number, length in enumerate(lengths):
        header[f"t{number}"] = entry(end, end + 4 * length, [length])
        end += 4 * length
    for number, side, change in changes:
        header[f"t{number % len(lengths)}"]["data_offsets"][side] += change
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(header, max(0, end + extra_bytes)))
    try:
        with safe_open(path, framework="pt") as file:
            accepted = set(file.keys())
    except SafetensorError:
        with pytest.raises(CorruptWeights):
            open_directory(tmp_path)
    else:
        assert open_directory(tmp_path).names() == accepted


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "",
        "..\\b.safetensors",
        "C:\\b.safetensors",
        "..",
    ],
)
def test_index_that_points_outside_its_directory_is_unsafe(tmp_path: Path, shard: str) -> None:
    save_shards(tmp_path, {"w": shard})
    with pytest.raises(UnsafeWeights, match=r"a shard must lie in the index's own directory"):
        open_directory(tmp_path)


def test_shards_may_be_links_into_a_download_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_shards(snapshot)
    for number, path in enumerate(sorted(snapshot.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(Path(os.path.relpath(blobs / str(number), snapshot)))
    assert_equal(open_directory(snapshot), random_tensors())


def truncate_shard(directory: Path) -> None:
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def rewrite_index(text: str) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(text)

    return rewrite


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], type[ModelError], str]] = {
    "missing": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), ModelNotFound, "model-00002-of-00002"),
    "truncated": (truncate_shard, CorruptWeights, "model-00002-of-00002.safetensors has .* tensors end at byte"),
    "no JSON": (rewrite_index("{"), CorruptWeights, "index.json is not valid JSON"),
    "no map": (rewrite_index('{"metadata": {}}'), CorruptWeights, "weight_map must map each tensor"),
    "numbers": (rewrite_index('{"weight_map": {"w": 1}}'), CorruptWeights, "weight_map must map each tensor"),
    "tensor elsewhere": (
        rewrite_index('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'),
        CorruptWeights,
        "places w in model-00001-of-00002.safetensors, which lacks it",
    ),
    "NUL": (rewrite_index('{"weight_map": {"w": "a\\u0000b"}}'), ModelNotFound, "cannot be read"),
    "directory": (rewrite_index('{"weight_map": {"w": "."}}'), ModelNotFound, "cannot be read"),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), ModelNotFound, "has neither"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused(tmp_path: Path, case: str) -> None:
    damage, error, message = BAD_SHARDS[case]
    save_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        open_directory(tmp_path)
