"""How far the quantised arithmetic leads from the model: KL divergence from the fp32 reference, beside llama.cpp's.

    python benchmarks/compare_quality.py [--peers-python PATH] [--positions 2048]

The text is this project's licence, in windows of 512 tokens. The reference is TorchOps in fp32 on the dequantised
weights. Reported are the mean over positions of KL(reference, engine) in nats, and how often both find the same token
likeliest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inferneo_benchmarks.compare_peers import Engine as Peer
from torch import Tensor

from inferneo_core import Engine
from inferneo_core.batch import AttentionMetadata, ModelInput
from inferneo_core.weights import resolve

WINDOW = 512
TEXT = Path(__file__).parents[1] / "LICENSE"
Logits = Callable[[list[int]], Tensor]


def engine_logits(engine: Engine) -> Logits:
    """[len(ids), vocab_size]: a whole window as one prefill, verb by verb."""
    runner = engine._runner

    def logits(ids: list[int]) -> Tensor:
        count, places = len(ids), torch.arange(len(ids))
        size = runner.cache.block_size
        tables = torch.arange(-(-count // size), dtype=torch.int32)[None]
        starts, lens = torch.tensor([0, count]).int(), torch.tensor([count]).int()
        attention = AttentionMetadata(starts, lens, tables, count, count)
        inputs = ModelInput(torch.tensor(ids), places, places, attention, places)
        with torch.inference_mode():
            x = runner.model.forward(runner.ops, inputs, runner.cache)
            return runner.ops.lm_head(x, runner.model.norm, runner.model.head)

    return logits


def llama_logits(peer: Peer) -> Logits:
    def logits(ids: list[int]) -> Tensor:
        with tempfile.TemporaryDirectory() as directory:
            path = str(Path(directory) / "logits.npy")
            peer.ask({"what": "logits", "ids": ids, "path": path})
            return torch.from_numpy(np.load(path))

    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--positions", type=int, default=2048)
    args = parser.parse_args()
    path = resolve("smollm2-135m-instruct").gguf_path
    assert path is not None
    options: dict[str, Any] = {"max_model_len": WINDOW, "max_num_seqs": 1}
    reference = Engine(path, ops="torch", dtype="float32", **options)
    engines = {
        f"inferneo, {dtype} cache": engine_logits(Engine(path, ops="cpu", kv_cache_dtype=dtype, **options))
        for dtype in ("bfloat16", "float16", "float32", "int8")
    }
    peer = Peer("llama.cpp", "llama.cpp", args.peers_python, path, torch.get_num_threads())
    if peer.is_absent:
        print(f"llama.cpp: absent ({peer.greeting['absent']})")
    else:
        engines["llama.cpp"] = llama_logits(peer)
    ids = reference.tokenizer.encode(TEXT.read_text())[: args.positions]
    totals = {name: [0.0, 0.0] for name in engines}
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        expected = engine_logits(reference)(window).double().log_softmax(-1)
        for name, logits in engines.items():
            actual = logits(window).double().log_softmax(-1)
            totals[name][0] += float((expected.exp() * (expected - actual)).sum())
            totals[name][1] += float((expected.argmax(-1) == actual.argmax(-1)).sum())
    print(f"{len(ids)} positions")
    for name, (divergence, same) in totals.items():
        print(f"{name:26} mean KL {divergence / len(ids):.6f} nats, same likeliest token {same / len(ids):.2%}")
    peer.close()


if __name__ == "__main__":
    main()
