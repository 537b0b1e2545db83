"""The shape of the house: which module may import which, what happens at import, how long a file may be.

Imports are read from the syntax tree, so those inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# The engine from the bottom up. A module imports only from the rows above its own, so there is no cycle either.
# A new module takes its place here first.
LAYERS = (
    "errors cache_rows",
    "config sampling_params outputs batch memory step_driver chat_meter tokenizer_spec gguf_pretokenizers",
    "sequence ops.base rope chat_sandbox gguf_tokenizer hf_tokenizer weights.dequant weights.fetch",
    "block_manager kv_cache chat ops.torch_sampling ops.cpu_tape ops.packing weights.checkpoint",
    "scheduler model tokenizer profile ops.torch_ops ops.cpu_ops weights.safetensors weights.gguf",
    "decode_arrays stream_decoder prompt loader ops.triton_ops cpu_graph cuda_graphs warm_up weights.hub",
    "batch_builder request ops weights",
    "stream runner",
    "assembly readers",
    "engine",
    "async_engine callbacks",
)
TRIO = ("sequence", "block_manager", "scheduler")


@dataclass(frozen=True)
class Import:
    """One import statement: the module it stands in, what it names, and whether it runs when the module loads."""

    importer: str
    target: str
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in source_files("inferneo_core", "inferneo", "kernels")}


def statements_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that runs when the module loads: not in functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements_at_import(child)


def targets(node: ast.Import | ast.ImportFrom, importer: str) -> Iterator[str]:
    """The modules that a statement names; `from package import module` names the module, not the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"{importer}, line {node.lineno}: imports are absolute here"
    assert node.module is not None
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in modules() else node.module


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for importer, path in modules().items():
        at_import = set(map(id, statements_at_import(tree(path))))
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found += [Import(importer, target, id(node) in at_import) for target in targets(node, importer)]
    return tuple(found)


def imported_by(importer: str) -> set[str]:
    return {edge.target for edge in imports() if edge.importer == importer}


def package(module: str) -> str:
    return module.partition(".")[0]


def reachable(start: str) -> set[str]:
    """Our own modules that `start` imports, directly or through others."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        new = {target for target in imported_by(pending.pop()) if target in modules()} - seen
        seen |= new
        pending += new
    return seen


# The arrows


def level_of() -> dict[str, int]:
    levels = {f"inferneo_core.{name}": level for level, names in enumerate(LAYERS) for name in names.split()}
    return {**levels, "inferneo_core": len(LAYERS)}


def test_layers_hold_every_module_of_the_engine_once():
    placed = [name for names in LAYERS for name in names.split()]
    assert sorted(placed) == sorted(set(placed))
    assert set(level_of()) == {name for name in modules() if package(name) == "inferneo_core"}


@pytest.mark.parametrize("name", sorted(name for name in modules() if package(name) == "inferneo_core"))
def test_imports_run_downward(name):
    levels = level_of()
    upward = [target for target in imported_by(name) if target in levels and levels[target] >= levels[name]]
    assert not upward, f"{name} imports {', '.join(upward)}, which do not stand below it"


def test_imports_have_no_cycle():
    on_cycle = sorted(name for name in modules() if name in reachable(name))
    assert not on_cycle, f"these modules import themselves through others: {', '.join(on_cycle)}"


def test_network_knows_no_backend_and_no_file_format():
    found = {name for name in reachable("inferneo_core.model") if ".ops." in name or ".weights" in name}
    assert found == {"inferneo_core.ops.base"}


def test_engine_never_imports_what_speaks_to_the_terminal():
    edges = [edge for edge in imports() if package(edge.importer) == "inferneo_core"]
    assert edges
    assert not [edge for edge in edges if package(edge.target) == "inferneo"]


@pytest.mark.parametrize("name", TRIO)
def test_scheduler_trio_reaches_no_torch(name):
    start = f"inferneo_core.{name}"
    users = [module for module in (start, *reachable(start)) if "torch" in map(package, imported_by(module))]
    assert not users


def test_kernels_import_only_torch_triton_and_the_standard_library():
    allowed = {"torch", "triton", "inferneo_kernels", *sys.stdlib_module_names}
    strays = [edge for edge in imports() if package(edge.importer) == "inferneo_kernels"]
    assert not [edge for edge in strays if package(edge.target) not in allowed]


def test_terminal_package_loads_nothing_heavy_at_import():
    heavy = {"torch", "numpy", "inferneo_core", "openai", "websockets", "fastapi", "uvicorn"}
    on_first_use = ("inferneo.client", "inferneo.server")
    edges = [edge for edge in imports() if package(edge.importer) == "inferneo" and edge.at_import]
    edges = [edge for edge in edges if not edge.importer.startswith(on_first_use)]
    assert edges
    assert not [edge for edge in edges if package(edge.target) in heavy or edge.target.startswith(on_first_use)]


def test_client_knows_neither_the_engine_nor_the_server():
    targets_of_client = {edge.target for edge in imports() if edge.importer.startswith("inferneo.client")}
    assert "openai" in targets_of_client
    assert not {name for name in targets_of_client if package(name) in ("torch", "inferneo_core")}
    assert not {name for name in targets_of_client if name.startswith(("inferneo.server", "inferneo.cli_"))}


def test_only_the_command_line_and_the_server_know_the_engine():
    terminal = [edge for edge in imports() if package(edge.importer) == "inferneo"]
    users = {edge.importer for edge in terminal if package(edge.target) == "inferneo_core"}
    assert "inferneo.cli" in users
    assert all(name.startswith(("inferneo.cli", "inferneo.server")) for name in users)
    assert not {name for name in users if name.startswith("inferneo.client")}


def test_kernels_folder_is_no_package():
    # An __init__.py here would shadow the PyPI package `kernels`, which transformers imports.
    assert (ROOT / "kernels" / "inferneo_kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


# Nothing at import


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    mutable = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in mutable


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_keeps_no_mutable_state(name):
    for node in tree(modules()[name]).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            names = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            assert names == "__all__" or not is_mutable(node.value), f"{name}: {names}, line {node.lineno}"
    globals_ = [node.lineno for node in ast.walk(tree(modules()[name])) if isinstance(node, ast.Global)]
    assert not globals_, f"{name}: `global` on lines {globals_}"


def test_importing_the_engine_starts_no_thread_and_asks_no_environment():
    code = """
import os, sys, threading
import gguf, jinja2, numpy, safetensors, tokenizers, torch, tqdm  # what others do at import is theirs

class Watched(dict):
    def __getitem__(self, key): raise AssertionError(f"read {key} at import")
    get = __getitem__
    __contains__ = __getitem__

os.environ = Watched()
os.getenv = Watched().get
threads = threading.active_count()
import inferneo_core
assert threading.active_count() == threads
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


# Size


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for folder in ("inferneo_core", "inferneo", "kernels", "csrc", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h")
    ],
)
def test_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_setup_script_is_short():
    assert len((ROOT / "setup.py").read_text(encoding="utf-8").splitlines()) < 80
