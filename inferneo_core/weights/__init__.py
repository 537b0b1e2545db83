"""Model files: where a name resolves to (hub), and the tensors in them (safetensors, gguf) behind one Checkpoint."""

from inferneo_core.weights.checkpoint import Checkpoint
from inferneo_core.weights.gguf import read_gguf
from inferneo_core.weights.hub import ModelFiles, resolve
from inferneo_core.weights.safetensors import read_safetensors

__all__ = ["Checkpoint", "ModelFiles", "open_checkpoint", "resolve"]


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Read the headers of a model's weight files and map them; no weight is read.

    Args:
        files: from `resolve`.
    Returns:
        Checkpoint; for GGUF with the file's metadata.
    Raises:
        ModelNotFound, CorruptWeights, UnsafeWeights, UnsupportedModel: as the readers of the two formats say.
    """
    if files.gguf_path is not None:
        return read_gguf(files.gguf_path)
    return Checkpoint(files.directory, read_safetensors(files.directory))
