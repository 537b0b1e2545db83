"""GET /metrics: the figures after known requests."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

COMPLETIONS = "/v1/completions"
REQUEST = {"model": "tiny", "prompt": "x" * 40, "max_tokens": 6, "ignore_eos": True, "seed": 1}


def figures(client: Any) -> dict[str, float]:
    """Each sample's value by its name and labels, the model's name left out."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            assert sample.labels["model_name"] == "tiny"
            values[sample.name.removeprefix("inferneo:") + "".join(f" {key}={labels[key]}" for key in labels)] = (
                sample.value
            )
    return values


def test_figures_count_what_was_done(live_server: Any) -> None:
    server = live_server()
    with server.client() as client:
        before = figures(client)
        assert before["num_requests_open"] == before["generation_tokens_total"] == 0
        client.post(COMPLETIONS, json=REQUEST)
        client.post(COMPLETIONS, json={**REQUEST, "stream": True, "n": 2})
        client.post(COMPLETIONS, json={**REQUEST, "n": 0})
        client.post(COMPLETIONS, json={**REQUEST, "model": "other"})
        server.wait_until_idle()
        after = figures(client)
    assert after["generation_tokens_total"] == 18
    assert after["prompt_tokens_total"] == 3 * 40
    assert after["prefix_cache_hits_total"] > 0
    assert after["prefix_cache_queries_total"] >= after["prefix_cache_hits_total"]
    assert after["kv_cache_usage_perc"] == after["num_requests_running"] == after["num_requests_waiting"] == 0
    assert after["requests_total path=/v1/completions status=200"] == 2
    assert after["requests_total path=/v1/completions status=400"] == 1
    assert after["requests_total path=/v1/completions status=404"] == 1
    assert after["request_success_total finished_reason=length"] == 3
    assert after["e2e_request_latency_seconds_count"] == 2
    assert after["time_to_first_token_seconds_count"] == after["request_queue_time_seconds_count"] == 3
    assert after["request_time_per_output_token_seconds_count"] == 3
    assert 0 < after["inter_token_latency_seconds_count"] <= 12
    assert after["time_to_first_token_seconds_bucket le=+Inf"] == 3


def test_requests_under_way_and_aborts_show(live_server: Any, halt: Any, beside: Any) -> None:
    server = live_server()
    halted = halt(server.engine._engine, 3)
    with server.client() as client:
        connection = server.connect()
        body = '{"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": true}'
        connection.sendall(beside("live").post(COMPLETIONS, body))
        halted.reached()
        during = figures(client)
        assert during["num_requests_open"] == during["num_requests_running"] == 1
        assert during["kv_cache_usage_perc"] > 0
        connection.close()
        server.wait_until(lambda: server.service.lifecycle.num_requests == 0)
        halted.go()
        server.wait_until_idle()
        after = figures(client)
    assert after["request_aborts_total"] == 1
    assert after["requests_total path=/v1/completions status=499"] == 1
    assert after["request_success_total finished_reason=abort"] == 1


def test_two_servers_count_for_themselves(live_server: Any) -> None:
    first, second = live_server(), live_server()
    with first.client() as client:
        client.post(COMPLETIONS, json=REQUEST)
    with second.client() as client:
        assert "requests_total path=/v1/completions status=200" not in figures(client)
