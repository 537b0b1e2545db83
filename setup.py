"""Builds the C++ extension `inferneo_core._C`; everything else about the package stands in pyproject.toml.

Install with `pip install --no-build-isolation -e .`: the build needs the torch that the package will run with.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("inferneo: building needs torch: pip install torch, then pip install --no-build-isolation -e .")

ROOT = Path(__file__).parent

# -ffp-contract=off: a fused multiply-add would change the bits that every instruction set and backend agrees on.
# -fno-trapping-math lets both arms of a float select be computed; it changes no result.
COMPILE_ARGS = [
    "-std=c++20",
    "-O3",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11 and of every later one
]


def csrc_files(suffix: str) -> list[str]:
    """The extension's files; the C++ tests are programs of their own."""
    paths = sorted((ROOT / "csrc").rglob(f"*{suffix}"))
    return [path.relative_to(ROOT).as_posix() for path in paths if not path.stem.endswith("_test")]


class BuildCsrc(BuildExtension):
    """BuildExtension that says what to do when there is no compiler."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"inferneo: no C++ compiler: '{compiler}' is not on PATH. Install one that knows C++20 "
                "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), "
                "or set CXX to yours."
            )
        super().build_extensions()


setup(
    packages=[
        *("inferneo_core", "inferneo_core.ops", "inferneo_core.weights", "inferneo", "inferneo.client"),
        *("inferneo.server", "inferneo_kernels", "inferneo_benchmarks", "inferneo_benchmarks.gpu"),
    ],
    package_dir={"inferneo_kernels": "kernels/inferneo_kernels", "inferneo_benchmarks": "benchmarks"},
    package_data={
        "inferneo_core": ["py.typed", "_C.pyi"],
        "inferneo": ["py.typed"],
        "inferneo.server": ["page.html", "page.css", "page.js"],
        "inferneo_benchmarks": ["floors.cpp"],
    },
    ext_modules=[
        CppExtension(
            "inferneo_core._C",
            sources=csrc_files(".cpp"),
            depends=csrc_files(".h"),
            extra_compile_args=COMPILE_ARGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildCsrc},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
