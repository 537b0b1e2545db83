"""Kernel tests run in Triton's interpreter on the CPU, or on the GPU where INFERNEO_TEST_DEVICE=cuda says so.

A kernel is interpreted or compiled for good when its module is imported, so the choice is made here, before any is.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("INFERNEO_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _hasten_interpreter() -> Iterator[None]:
    """Halve the interpreter's time. It lists triton.language anew at every call of a device function, and checks every
    integer operation for overflow, which a GPU does not."""
    import triton.language as tl
    from triton.runtime import interpreter

    builtins = {
        package: [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        for name, member in builtins[package]:
            if getattr(package, name) is member:  # not patched yet
                interpreter._patch_attr(package, name, member, builder, *scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests put their tensors."""
    return torch.device(DEVICE)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random CPU tensors; move them to `device`."""
    return torch.Generator().manual_seed(0)


Mutation = tuple[str, str, str]
AssertCaught = Callable[[str, Mutation, Callable[[ModuleType], None]], None]
PACKAGE = "inferneo_kernels"


@pytest.fixture
def assert_caught(tmp_path: Path) -> AssertCaught:
    """assert_caught(entry, (module, old, new), check) fails unless `check` fails on a kernel made wrong in one place.

    A test that passes on a wrong mask, stride or scale proves nothing. So each kernel family lists such mistakes: in
    inferneo_kernels/{module}.py the text `old`, which must stand there once, becomes `new`. The kernels are imported
    anew with it, and `check` is given inferneo_kernels.{entry}, whose imports may lead to the mistake. It must pass on
    the right kernels, as the caller's other tests show, and fail by an AssertionError here.
    """

    def run(entry: str, mutation: Mutation, check: Callable[[ModuleType], None]) -> None:
        name, old, new = mutation
        spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
        assert spec is not None and spec.origin is not None, name
        source = Path(spec.origin).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {spec.origin}"
        path = tmp_path / f"{name}.py"  # a file: Triton reads a kernel's source from there
        path.write_text(source.replace(old, new), encoding="utf-8")
        with _fresh_package():
            _import_as(f"{PACKAGE}.{name}", path)
            module = importlib.import_module(f"{PACKAGE}.{entry}")
            try:
                check(module)
            except AssertionError:
                return
        pytest.fail(f"not caught: {old!r} -> {new!r}")

    return run


@contextmanager
def _fresh_package() -> Iterator[None]:
    """While the block runs the kernels are imported anew; afterwards the modules are those of before."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(before)


def _import_as(name: str, path: Path) -> None:
    package = importlib.import_module(PACKAGE)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(package, name.rpartition(".")[2], module)
