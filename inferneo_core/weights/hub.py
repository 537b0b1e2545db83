"""Where a model name resolves to: a directory, a GGUF file, a known name, or a Hugging Face hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inferneo_core.errors import ModelNotFound, UnsafeWeights
from inferneo_core.weights.checkpoint import parse_json_object
from inferneo_core.weights.fetch import KNOWN_MODELS, cache_directory, fetch_from_hub, fetch_known
from inferneo_core.weights.gguf import MAGIC
from inferneo_core.weights.safetensors import INDEX_FILE, SINGLE_FILE

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        format: "safetensors": `directory` holds config.json and the weights; "gguf": one file holds everything.
        directory: where the files lie.
        gguf_path: the file, when the format is "gguf".
    """

    format: Literal["safetensors", "gguf"]
    directory: Path
    gguf_path: Path | None = None

    def config(self) -> dict[str, Any]:
        """config.json of a safetensors model.

        Raises:
            ModelNotFound: there is none; a GGUF keeps its configuration in its metadata.
            CorruptWeights: it is no JSON object.
        """
        path = self._beside("config.json")
        if path is None:
            raise ModelNotFound(f"{self.gguf_path or self.directory} has no config.json (fetch the model again)")
        return _read_json(path)

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty when there is none. Raises CorruptWeights: it is no JSON object."""
        path = self._beside("generation_config.json")
        return {} if path is None else _read_json(path)

    @property
    def tokenizer_json(self) -> Path | None:
        return self._beside("tokenizer.json")

    @property
    def tokenizer_config_json(self) -> Path | None:
        return self._beside("tokenizer_config.json")

    @property
    def chat_template_jinja(self) -> Path | None:
        return self._beside("chat_template.jinja")

    def _beside(self, name: str) -> Path | None:
        # What lies beside a GGUF file may belong to another model; the file carries its own.
        path = self.directory / name
        return path if self.gguf_path is None and path.is_file() else None


def resolve(model: str | Path) -> ModelFiles:
    """Find a model's files, fetching them if need be.

    Args:
        model: a directory (config.json and safetensors, or exactly one .gguf), a GGUF file, a name in KNOWN_MODELS,
            or a hub id "organisation/name". What exists on disk comes first.
    Raises:
        ModelNotFound: it is none of these, a file is missing, or it cannot be fetched.
        UnsafeWeights: the weights are pickled.
        CorruptWeights: what was fetched is not what was asked for.
    """
    name = str(model)
    path = _existing(model)
    if path is not None:
        return _resolve_directory(path) if path.is_dir() else _resolve_file(path)
    if isinstance(model, str) and name in KNOWN_MODELS:
        gguf_path = fetch_known(KNOWN_MODELS[name], cache_directory())
        return ModelFiles("gguf", gguf_path.parent, gguf_path)
    if isinstance(model, str) and _HUB_ID.fullmatch(name):
        return _resolve_directory(fetch_from_hub(name))
    raise ModelNotFound(
        f"{name!r:.200} is no directory, no GGUF file, no known model ({', '.join(KNOWN_MODELS)}) and no hub id like "
        "organisation/name (check the path)"
    )


def _existing(model: str | Path) -> Path | None:
    if model == "":
        return None  # pathlib takes it for the current directory
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, the home of an unknown user
        return None


def _resolve_directory(directory: Path) -> ModelFiles:
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{directory} has weights but no config.json (fetch the model again)")
        return ModelFiles("safetensors", directory)
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ModelFiles("gguf", directory, directory / ggufs[0])
    if ggufs:
        raise ModelNotFound(f"{directory} has {len(ggufs)} .gguf files: {_listed(ggufs)} (pass the path of one)")
    pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickled:
        raise _pickled(directory, _listed(pickled))
    raise ModelNotFound(
        f"{directory} has no {SINGLE_FILE}, no {INDEX_FILE} and no .gguf file; it has {_listed(names) or 'no files'} "
        "(pass the directory of a model)"
    )


def _resolve_file(path: Path) -> ModelFiles:
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickled(path.parent, path.name)
    if path.suffix == ".safetensors":
        raise ModelNotFound(f"{path} holds weights without their configuration (pass its directory, {path.parent})")
    if path.suffix != ".gguf" and _first_bytes(path) != MAGIC:
        raise ModelNotFound(f"{path} is no GGUF file (pass a .gguf file or the directory of a model)")
    return ModelFiles("gguf", path.parent, path)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error} (check its permissions)") from error


def _pickled(directory: Path, names: str) -> UnsafeWeights:
    return UnsafeWeights(
        f"{directory} has its weights in {names}; unpickling runs code from the file (convert them to safetensors)"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error} (check its permissions)") from error
    return parse_json_object(text, str(path))
