"""Fixtures that several test modules share: tiny random Llamas on disk, and the default model."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer as HubTokenizer, decoders, models, pre_tokenizers

from inferneo_core import Engine, SamplingParams, Tokenizer
from inferneo_core.weights import resolve

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}

TinyModel = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write tests/golden/ anew from its outside oracles")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny_model(**config) writes a random Llama of that config, once, and returns its directory."""
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        key = json.dumps([seed, str(dtype), overrides], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny")
            write_tiny_model(made[key], {**TINY_CONFIG, **overrides}, seed, dtype)
        return made[key]

    return make


def write_tiny_model(directory: Path, config: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    """A directory as a hub has it: config.json, model.safetensors, tokenizer.json."""
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, seed, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(directory / "tokenizer.json"))


def random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names, scaled so that attention and logits are neither flat nor saturated."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    weights = {"model.embed_tokens.weight": random(vocab, hidden), "model.norm.weight": 1 + random(hidden, scale=0.2)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = random(vocab, hidden, scale=0.3)
    projections = {
        "self_attn.q_proj": (q_size, hidden, config["attention_bias"]),
        "self_attn.k_proj": (kv_size, hidden, config["attention_bias"]),
        "self_attn.v_proj": (kv_size, hidden, config["attention_bias"]),
        "self_attn.o_proj": (hidden, q_size, config["attention_bias"]),
        "mlp.gate_proj": (intermediate, hidden, config["mlp_bias"]),
        "mlp.up_proj": (intermediate, hidden, config["mlp_bias"]),
        "mlp.down_proj": (hidden, intermediate, config["mlp_bias"]),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = 1 + random(hidden, scale=0.2)
        for name, (rows, columns, bias) in projections.items():
            weights[f"{prefix}.{name}.weight"] = random(rows, columns, scale=1.5 * columns**-0.5)
            if bias:
                weights[f"{prefix}.{name}.bias"] = random(rows, scale=0.5)
    return weights


def byte_tokenizer() -> HubTokenizer:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, 256 and 257 begin and end a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HubTokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


@pytest.fixture
def tiny_engine(tiny_model: TinyModel) -> Iterator[Callable[..., Engine]]:
    """tiny_engine(model=..., **engine arguments) makes an Engine that is closed when the test ends."""
    engines: list[Engine] = []

    def make(model: Path | None = None, **arguments: Any) -> Engine:
        arguments = {"kv_cache_memory": 8 * 2**20, "num_threads": 1, **arguments}
        engines.append(Engine(model or tiny_model(), **arguments))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def watched_engine(
    tiny_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """As tiny_engine; and whatever the test did, every block is back, and an open engine serves as on its first day."""
    made: list[Engine] = []

    def make(**arguments: Any) -> Engine:
        made.append(tiny_engine(**arguments))
        return made[-1]

    yield make
    monkeypatch.undo()
    gc.collect()
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    for engine in made:
        stats = engine.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
        assert stats.running == stats.waiting == 0
        if not engine._driver._is_closed:
            assert (
                engine.generate([[5, 6]], params)[0].token_ids == tiny_engine().generate([[5, 6]], params)[0].token_ids
            )


@pytest.fixture(scope="module")
def shared_engine(tiny_model: TinyModel) -> Iterator[Engine]:
    """One tiny Engine for all examples of a property test."""
    with Engine(tiny_model(), kv_cache_memory=8 * 2**20, num_threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The .gguf file of the default model, fetched once into the cache."""
    files = resolve("smollm2-135m-instruct")
    assert files.gguf_path is not None
    return files.gguf_path


@pytest.fixture(scope="session")
def default_engine(default_model: Path) -> Iterator[Engine]:
    """The default model on the reference ops in fp32; for tests that leave no request behind."""
    with Engine(default_model, ops="torch", dtype="float32", kv_cache_memory=2**29, max_model_len=2048) as engine:
        yield engine


@pytest.fixture(scope="session")
def default_tokenizer(default_engine: Engine) -> Tokenizer:
    """The default model's tokenizer."""
    return default_engine.tokenizer


class Background:
    """A call in a thread of its own. `result` returns or raises what the call did, and fails if it never ends."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(call, *args), daemon=True).start()

    def _run(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            self._future.set_result(call(*args))
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> Any:
        return self._future.result(timeout=60)

    def is_done(self) -> bool:
        return self._future.done()


@pytest.fixture
def background() -> Callable[..., Background]:
    """background(call, *args) starts the call in a thread."""
    return Background


def verb_by_verb(engine: Engine) -> None:
    """Makes an engine run its steps as calls of the verbs, which a test can reach into, not from a tape."""
    engine._runner._tape = None


@pytest.fixture
def at_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """at_call(engine, act, verb) calls act(k) inside a verb at its k-th call from now; "embed" has one call a step."""

    def hook(engine: Engine, act: Callable[[int], None], verb: str = "embed") -> None:
        verb_by_verb(engine)
        count, original = itertools.count(), getattr(engine._runner.ops, verb)

        def hooked(*args: Any) -> Any:
            act(next(count))
            return original(*args)

        monkeypatch.setattr(engine._runner.ops, verb, hooked)

    return hook


class Halt:
    """An engine that stands still inside one of its steps, from `reached` to `go`."""

    def __init__(self) -> None:
        self._inside, self._go = threading.Event(), threading.Event()

    def stand(self) -> None:
        self._inside.set()
        assert self._go.wait(60)

    def reached(self) -> None:
        assert self._inside.wait(60)

    def go(self) -> None:
        self._go.set()


@pytest.fixture
def halt(at_call: Callable[..., None]) -> Callable[[Engine, int], Halt]:
    """halt(engine, k) makes the engine stand still inside its k-th step from now."""

    def make(engine: Engine, step: int) -> Halt:
        halted = Halt()
        at_call(engine, lambda k: halted.stand() if k == step else None)
        return halted

    return make
