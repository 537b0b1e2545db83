"""One engine in a process of its own, for compare_peers.py: commands come as JSON lines, answers go back as such.

    python benchmarks/peer_worker.py ENGINE MODEL THREADS

Commands: {"what": "decode", "context": n, "tokens": n} -> seconds; {"what": "prefill", "tokens": n} -> seconds to the
first token; {"what": "streams", "streams": n, "prompt": n, "tokens": n} -> seconds; {"what": "memory"} -> bytes at
most. The model's own token ids go in everywhere, so no engine's tokenizer is measured. Greedy, never stopped early.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_CONTEXT = 8192


def prompt_ids(length: int, salt: int = 0) -> list[int]:
    """Different for every salt, so that no engine finds a prefix it has seen."""
    return [1000 + (i * 7919 + salt * 104_729) % 40_000 for i in range(length)]


class Inferneo:
    def __init__(self, path: str, threads: int) -> None:
        from inferneo_core import Engine, SamplingParams

        self._params = SamplingParams
        self._engine = Engine(path, ops="cpu", num_threads=threads, enable_prefix_caching=False, max_num_seqs=64)

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        params = self._params(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        streams = [self._engine.stream(prompt, params) for prompt in prompts]
        next(streams[0])
        first = time.perf_counter() - started
        for stream in streams:
            for _ in stream:
                pass
        return first, time.perf_counter() - started


class LlamaCpp:
    """Through llama-cpp-python's low-level API: no Python between two tokens but the call that decodes."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._threads = threads

    def _context(self, num_seqs: int, length: int) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_seqs * length, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = num_seqs, self._threads, self._threads
        return self._api.llama_init_from_model(self._model, params)

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        api = self._api
        context = self._context(len(prompts), len(prompts[0]) + tokens + 8)
        batch = api.llama_batch_init(2048, 0, 1)
        try:
            started = time.perf_counter()
            last = []
            for seq, prompt in enumerate(prompts):
                for begin in range(0, len(prompt), 2048):
                    self._decode(context, batch, [(t, begin + i, seq) for i, t in enumerate(prompt[begin:][:2048])])
                last.append(self._largest(context, -1))
                if seq == 0:
                    first = time.perf_counter() - started
            for step in range(1, tokens):
                place = len(prompts[0]) + step - 1
                self._decode(context, batch, [(token, place, seq) for seq, token in enumerate(last)], every=True)
                last = [self._largest(context, seq) for seq in range(len(prompts))]
            return first, time.perf_counter() - started
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)

    def logits(self, ids: list[int]) -> Any:
        """[len(ids), vocab_size] fp32: what follows each token of a text of at most 512."""
        import numpy as np

        context, batch = self._context(1, 512), self._api.llama_batch_init(512, 0, 1)
        try:
            self._decode(context, batch, [(token, place, 0) for place, token in enumerate(ids)], every=True)
            rows = [self._api.llama_get_logits_ith(context, i) for i in range(len(ids))]
            return np.stack([np.ctypeslib.as_array(row, shape=(self._vocab_size,)) for row in rows])
        finally:
            self._api.llama_batch_free(batch)
            self._api.llama_free(context)

    def _decode(self, context: Any, batch: Any, entries: list[tuple[int, int, int]], *, every: bool = False) -> None:
        batch.n_tokens = len(entries)
        for i, (token, place, seq) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = every or i == len(entries) - 1
        if self._api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _largest(self, context: Any, index: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


class OpenVino:
    """openvino-genai, which reads the GGUF itself; many prompts are a static batch."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self._api, self._openvino = openvino_genai, openvino
        self._pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        import numpy as np

        config = self._api.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = tokens, False, True
        first: list[float] = []
        started = time.perf_counter()

        def seen(_: object) -> bool:
            first.append(time.perf_counter() - started)
            return False

        ids = np.array(prompts, dtype=np.int64)
        inputs = self._api.TokenizedInputs(self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids)))
        self._pipeline.generate(inputs, config, seen if len(prompts) == 1 else None)
        seconds = time.perf_counter() - started
        return (first[0] if first else seconds), seconds


class Transformers:
    """transformers in bf16."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        torch = self._torch
        first: list[float] = []
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            for _ in range(tokens):
                last = output.logits[:, -1].argmax(-1, keepdim=True)
                first.append(time.perf_counter() - started)
                if len(first) < tokens:
                    output = self._model(last, past_key_values=output.past_key_values, use_cache=True)
        return first[0], first[-1]


class OnnxGenai:
    """onnxruntime-genai, on a model that its own builder has made."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai

        self._api = onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        length = len(prompts[0])
        params = self._api.GeneratorParams(self._model)
        params.set_search_options(
            max_length=length + tokens, min_length=length + tokens, do_sample=False, batch_size=len(prompts)
        )
        started = time.perf_counter()
        generator = self._api.Generator(self._model, params)
        import numpy as np

        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter() - started
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return first, time.perf_counter() - started


ENGINES: tuple[tuple[str, type[Any]], ...] = (
    ("inferneo", Inferneo),
    ("llama.cpp", LlamaCpp),
    ("openvino-genai", OpenVino),
    ("onnxruntime-genai", OnnxGenai),
    ("transformers", Transformers),
)


class Worker:
    """Turns commands into calls of an engine's `generate`, each with prompts that it has not seen."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._salt = 0

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        self._salt += count
        return [prompt_ids(length, self._salt + i) for i in range(count)]

    def decode(self, context: int, tokens: int) -> float:
        first, whole = self._engine.generate(self._prompts(1, context), tokens + 1)
        return float(whole - first)

    def prefill(self, tokens: int) -> float:
        first, _ = self._engine.generate(self._prompts(1, tokens), 1)
        return float(first)

    def streams(self, streams: int, prompt: int, tokens: int) -> float:
        _, whole = self._engine.generate(self._prompts(streams, prompt), tokens)
        return float(whole)

    def logits(self, ids: list[int], path: str) -> float:
        import numpy as np

        np.save(path, self._engine.logits(ids))
        return 0.0

    def memory(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints goes to stderr
    started = time.perf_counter()
    try:
        worker = Worker(dict(ENGINES)[name](path, threads))
        worker.prefill(8)
    except ImportError as error:
        print(json.dumps({"absent": repr(error)}), file=answers, flush=True)
        return
    print(json.dumps({"loaded": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        measure: Callable[..., float] = getattr(worker, command.pop("what"))
        print(json.dumps(measure(**command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
