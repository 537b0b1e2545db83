"""Results of benchmark runs: shares of the roofline, the comparison of two runs, and the report's page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from inferneo_benchmarks import results, timing
from inferneo_benchmarks.compare import compare, student_t
from inferneo_benchmarks.floors import Ceilings
from inferneo_benchmarks.report import write_report
from inferneo_benchmarks.results import Measurement, Result
from inferneo_benchmarks.table import comparison_table, in_time, result_table

CPU = Ceilings("cpu", 2, 1e10, {"int8": 1e12, "fp32": 2e11})
NUM_BENCHMARKS, NUM_PASSES, NUM_ROUNDS = 40, 5, 20


def measurement(name: str, seconds: list[list[float]], probes: list[list[float]], **fields: Any) -> Measurement:
    counted = {"num_bytes": 10**6, "num_operations": 10**6, "compute": "int8", **fields}
    return Measurement(name, "linear_add", "cpu", probe="read", seconds=seconds, probe_seconds=probes, **counted)


def run_of(measurements: list[Measurement], **fields: Any) -> Result:
    about: dict[str, Any] = {
        "when": "2026-01-02T03:04:05+00:00",
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "machine": {"processor": "A <CPU> & more", "cores": 2},
        "versions": {"python": "3.12", "torch": "2.13"},
        "options": {"threads": 2, "passes": NUM_PASSES},
        "ceilings": {"cpu": CPU},
        "steps": [],
        **fields,
    }
    return Result(measurements=measurements, **about)


def noisy_run(seed: int, slowed: dict[str, float] | None = None) -> Result:
    """A run of 40 benchmarks on a machine that drifts: a pass is off by 2% (some by 4%), a round by 5%, and one
    round in ten meets a busy neighbour. The machine's own speed moves by a third, and the probe with it."""
    source = random.Random(seed)
    found = []
    for index in range(NUM_BENCHMARKS):
        name = f"benchmark{index}"
        deviation = 0.04 if index % 10 == 0 else 0.02
        seconds, probes = [], []
        for _ in range(NUM_PASSES):
            speed, offset = source.uniform(0.75, 1.25), math.exp(source.gauss(0, deviation))
            rounds = [speed * math.exp(source.gauss(0, 0.05)) for _ in range(NUM_ROUNDS)]
            probes.append([1e-3 * pace for pace in rounds])
            true = 2e-4 * (index + 1) * (slowed or {}).get(name, 1.0) * offset
            busy = [source.uniform(1.5, 3) if source.random() < 0.1 else 1.0 for _ in rounds]
            seconds.append([true * pace * late for pace, late in zip(rounds, busy, strict=True)])
        found.append(measurement(name, seconds, probes))
    return run_of(found)


# Comparison


def test_same_code_is_called_equal_nine_times_in_ten() -> None:
    equal = [not compare(noisy_run(2 * seed), noisy_run(2 * seed + 1)).changed for seed in range(40)]
    assert sum(equal) >= 36


def test_kernel_slowed_by_a_tenth_is_found_and_nothing_else() -> None:
    found = []
    for seed in range(20):
        comparison = compare(noisy_run(2 * seed), noisy_run(2 * seed + 1, {"benchmark7": 1.1}))
        found.append([(one.name, one.verdict) for one in comparison.changed] == [("benchmark7", "slower")])
    assert sum(found) >= 18


def test_comparison_says_how_much_and_in_which_direction() -> None:
    comparison = compare(noisy_run(1), noisy_run(2, {"benchmark3": 0.5}))
    (one,) = comparison.changed
    assert one.verdict == "faster"
    assert one.change == pytest.approx(-0.5, abs=0.05)
    assert re.fullmatch(r"1 of 40 benchmarks differ: benchmark3 is (4|5)\d\.\d% faster", comparison.summary)
    assert "benchmark3" in comparison_table(comparison).splitlines()[1]  # what changed comes first


def test_comparison_of_a_run_with_itself_is_no_difference() -> None:
    run = noisy_run(5)
    comparison = compare(run, run)
    assert comparison.summary == "no difference in 40 benchmarks"
    assert {one.change for one in comparison.differences} == {0.0}


def test_comparison_takes_out_the_drift_of_the_machine() -> None:
    run = noisy_run(5)
    twice_as_slow = [
        dataclasses.replace(
            one,
            seconds=[[2 * second for second in rounds] for rounds in one.seconds],
            probe_seconds=[[2 * second for second in rounds] for rounds in one.probe_seconds],
        )
        for one in run.measurements
    ]
    assert not compare(run, run_of(twice_as_slow)).changed


def test_comparison_refuses_a_run_that_does_not_know_its_noise() -> None:
    short = run_of([measurement("a", [[1.0], [1.0]], [[1.0], [1.0]])])
    with pytest.raises(ValueError, match="a has 2 passes; a comparison needs 3"):
        compare(short, short)


def test_comparison_names_what_makes_it_doubtful() -> None:
    before, after = noisy_run(1), noisy_run(2)
    other = dataclasses.replace(after, machine={"processor": "B", "cores": 2}, options={"threads": 1})
    assert compare(before, after).remarks == []
    remarks = compare(before, other).remarks
    assert remarks == ["machine: processor was A <CPU> & more, is B", "threads: 2 before, 1 after"]


def test_comparison_lists_benchmarks_of_one_run_only() -> None:
    before, after = noisy_run(1), noisy_run(2)
    shorter = dataclasses.replace(after, measurements=after.measurements[1:])
    assert compare(before, shorter).only_before == ["benchmark0"]
    assert compare(shorter, before).only_after == ["benchmark0"]
    nothing = dataclasses.replace(after, measurements=[])
    assert compare(before, nothing).summary == "no benchmark is in both runs"


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),  # from printed tables of Student's t
    [(0.975, 4, 2.776), (0.975, 16, 2.120), (0.995, 8, 3.355), (0.9995, 16, 4.015), (0.9995, 30, 3.646)],
)
def test_student_t_equals_the_tables(probability: float, degrees: int, quantile: float) -> None:
    assert student_t(probability, degrees) == pytest.approx(quantile, rel=0.01)


# Results


def a_pass(seconds: list[float], **fields: Any) -> dict[str, Any]:
    one = dataclasses.asdict(measurement("a", [seconds], [seconds], **fields))
    one = {**one, "seconds": seconds, "probe_seconds": seconds}
    ceilings = [dataclasses.asdict(CPU)]
    return {"ceilings": ceilings, "fastest": ceilings, "benchmarks": [one], "steps": [{"name": "s"}]}


def about() -> dict[str, Any]:
    whole = run_of([])
    return {name: getattr(whole, name) for name in ("when", "commit", "machine", "versions", "options")}


def test_share_is_the_roofline_over_the_time() -> None:
    by_memory = measurement("a", [[4e-4, 2e-4, 9e-4]], [[1.0] * 3])  # 1e6 bytes at 1e10 a second: 1e-4 s
    assert by_memory.share(CPU) == pytest.approx(0.25)
    by_products = measurement("a", [[4e-4]], [[1.0]], num_operations=2 * 10**8)  # 2e-4 s
    assert by_products.share(CPU) == pytest.approx(0.5)
    assert run_of([]).share(measurement("a", [[1.0]], [[1.0]], num_bytes=0)) is None


def test_merge_puts_the_passes_of_a_benchmark_together() -> None:
    faster = {
        **a_pass([3e-4], facts={"tokens_per_s": 4.0}),
        "ceilings": [{**dataclasses.asdict(CPU), "bytes_per_s": 2e10}],
    }
    merged = results.merge([a_pass([2e-4, 2e-4], facts={"tokens_per_s": 2.0}), faster], **about())
    (one,) = merged.measurements
    assert one.seconds == [[2e-4, 2e-4], [3e-4]]
    assert one.facts == {"tokens_per_s": 3.0}  # the median of the passes
    assert merged.ceilings["cpu"].bytes_per_s == 1.5e10  # the median of the passes
    assert merged.steps == [{"name": "s"}]
    assert 0 < merged.share(one) <= 1


def test_ceiling_is_not_an_accident_of_a_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        num_threads = 2

        def __init__(self, num_threads: int) -> None: ...

        def rates(self) -> dict[str, list[float]]:
            return {"read": [30e9, 36e9] * 10, "int8": [1e12] * 40}

    monkeypatch.setattr(timing, "CpuProbe", Probe)
    meter = timing.CpuMeter(2)
    assert meter.ceilings == Ceilings("cpu", 2, 36e9, {"int8": 1e12})
    meter.learn("read", [timing.PROBE_BYTES / 70e9] * 2)  # two samples of 22
    assert meter.ceilings.bytes_per_s == 36e9
    meter.learn("read", [timing.PROBE_BYTES / 40e9] * 20)  # half of 42: the machine can do that
    assert meter.ceilings.bytes_per_s == pytest.approx(40e9)
    meter.learn("python", [1.0])
    assert meter.fastest.bytes_per_s == pytest.approx(70e9)
    assert meter.ceilings.operations_per_s == {"int8": 1e12}


def test_merge_raises_a_ceiling_that_a_kernel_exceeds_a_little() -> None:
    merged = results.merge([a_pass([0.95e-4])], **about())
    assert merged.share(merged.measurements[0]) == pytest.approx(1.0)


def test_merge_believes_a_kernel_that_the_fastest_sample_explains() -> None:
    """Memory read twice as fast for some milliseconds, and a kernel ran in them."""
    quick = {**a_pass([0.5e-4]), "fastest": [{**dataclasses.asdict(CPU), "bytes_per_s": 2e10}]}
    merged = results.merge([quick], **about())
    assert merged.share(merged.measurements[0]) == pytest.approx(1.0)


def test_merge_refuses_a_kernel_that_beats_the_machine() -> None:
    with pytest.raises(ValueError, match="a reaches 200% of the roofline"):
        results.merge([a_pass([0.5e-4])], **about())


def test_result_survives_its_file(tmp_path: Path) -> None:
    run = results.merge([a_pass([2e-4])] * 3, **about())
    run.write(tmp_path / "deep" / "result.json")
    assert results.read(tmp_path / "deep" / "result.json") == run


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 0}', "\xff"])
def test_reading_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"result\.json"):
        results.read(path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (7.89e-8, "78.9 ns")]
)
def test_times_are_shown_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


# Report


class Sources(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def full_run(seed: int) -> Result:
    run = noisy_run(seed)
    last = dataclasses.replace(run.measurements[-1], latencies_ms=[1.0, 2.0, 2.5, 8.0])
    verbs = {"attention": {"seconds": 1e-3, "floor_seconds": 5e-4}, "lm_head": {"seconds": 2e-3, "floor_seconds": 1e-3}}
    step = {"name": "decode at 16", "device": "cpu", "total_s": 4e-3, "verbs": verbs}
    return dataclasses.replace(run, measurements=[*run.measurements[:-1], last], steps=[step])


@pytest.fixture
def page(tmp_path: Path) -> Path:
    before, after = full_run(1), full_run(2)
    return write_report(tmp_path, after, before, compare(before, after))


def test_report_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = Sources()
    sources.feed(text)
    assert sources.found
    assert all(source.startswith("data:") for source in sources.found)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text


def test_report_draws_every_picture_and_escapes_what_it_shows(page: Path) -> None:
    names = {path.name for path in page.parent.glob("*.png")}
    assert names == {"roofline-cpu.png", "steps.png", "latencies.png", "changes.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    text = page.read_text(encoding="utf-8")
    assert "A &lt;CPU&gt; &amp; more" in text
    assert "no difference in 40 benchmarks" in text


def test_table_has_a_row_a_benchmark() -> None:
    run = noisy_run(3)
    lines = result_table(run).splitlines()
    assert len(lines) == 1 + NUM_BENCHMARKS + 1
    shares = [int(match) for match in re.findall(r"(\d+)%  ", result_table(run))]
    assert len(shares) >= NUM_BENCHMARKS
    assert all(0 <= share <= 100 for share in shares)


@pytest.mark.slow
def test_report_shows_its_pictures_in_a_browser(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        reason = "chromium is not installed"
        pytest.fail(reason) if os.environ.get("INFERNEO_REQUIRE_BROWSER") else pytest.skip(reason)
    script = "document.title = JSON.stringify([...document.images].map(i => [i.naturalWidth, i.naturalHeight]))"
    watched = tmp_path / "watched.html"
    text = page.read_text(encoding="utf-8")
    watched.write_text(f"{text}<script>addEventListener('load', () => {{ {script} }})</script>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", watched.as_uri()]
    shown = subprocess.run([browser, *options], check=True, capture_output=True, text=True, timeout=300).stdout
    title = re.search("<title>(.*?)</title>", shown)
    assert title is not None
    sizes = json.loads(title[1])
    assert len(sizes) == 4
    assert all(width >= 800 and height >= 200 for width, height in sizes)


def test_noise_of_a_pass_is_not_that_of_a_round() -> None:
    run = noisy_run(9)
    (difference, *_) = compare(run, run).differences
    rounds = [
        second / probe
        for second, probe in zip(run.measurements[0].seconds[0], run.measurements[0].probe_seconds[0], strict=True)
    ]
    assert difference.noise_before < statistics.stdev(rounds) / statistics.median(rounds)
