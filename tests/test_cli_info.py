"""`inferneo info`: what it counts, against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from inferneo.cli import app
from inferneo.cli_info import in_units


def info_lines(*arguments: str) -> dict[str, str]:
    result = CliRunner().invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.stderr
    pairs = [line.strip().split("  ", 1) for line in result.stdout.splitlines()]
    return {name: value.strip() for name, value in pairs}


def test_info_counts_parameters_and_memory(tiny_model):
    lines = info_lines(str(tiny_model(dtype=torch.bfloat16)))
    assert lines["architecture"] == (
        "Llama, 3 layers, hidden size 48, 6 heads of 8 (2 for keys and values), MLP 80, vocabulary 263, RoPE default"
    )
    # embedding and head 2 * 263 * 48; a layer 2 * 48 * 48 + 2 * 16 * 48 + 3 * 80 * 48 + 2 * 48; the last norm 48
    assert lines["parameters"] == "78,576"
    assert lines["stored"] == "153.5 KiB (BF16 100.0 %)"
    assert lines["weights"] == "153.5 KiB, as they are stored"
    assert lines["KV cache"] == "96.0 KiB for 512 tokens, bfloat16"  # 2 * 3 layers * 2 heads * 8 * 2 bytes each
    assert lines["memory"].startswith("249.5 KiB on ")


def test_info_counts_memory_for_the_context_asked_for(tiny_model):
    assert info_lines(str(tiny_model()), "--context", "2")["KV cache"] == "768 bytes for 2 tokens, float32"


def test_info_context_beyond_the_model_is_refused(tiny_model):
    result = CliRunner().invoke(app, ["info", str(tiny_model()), "--context", "513"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --context is 513; the model's limit is 512 tokens (lower --context)\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**50, "3,072.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(num_bytes, text):
    assert in_units(num_bytes) == text


@pytest.mark.slow
def test_info_of_the_default_model(default_model):
    lines = info_lines(str(default_model))
    assert lines["parameters"] == "134,515,008"
    assert lines["stored"].startswith("92.1 MiB (Q4_1 ")
    # The engine keeps Q4_1 as it is, and 2 * 30 layers * 3 heads * 64 * 2 bytes = 22.5 KiB a token.
    assert lines["weights"] == "92.1 MiB, as they are stored"
    assert lines["KV cache"] == "180.0 MiB for 8,192 tokens, bfloat16"
    assert lines["memory"].startswith("272.1 MiB on ")
