"""Metrics and traces, of the server and of programs that embed a store; dashboard and rules name what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_kit import require_server

require_server()

from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from memevolve_gpu import ConfigurationError, InvalidFilterError, VectorStore
from memevolve_gpu.server.metrics import CALLS, register, trace_calls

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "server"


def figures(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_embedded_store_is_measured_with_its_namespaces(store: VectorStore) -> None:
    registry = CollectorRegistry()
    register(store, registry)
    store.store_batch([{"content": "one"}, {"content": "two"}])
    view = store.namespace("org")
    view.store({"content": "three"})
    view.search("three")
    store.search_units("one")
    with pytest.raises(InvalidFilterError):
        store.search("x", filters={"a": {}})
    found = figures(generate_latest(registry).decode())
    counted = {method: found["memevolve_call_duration_seconds_count", (("method", method),)] for method in CALLS}
    assert {method: count for method, count in counted.items() if count} == {
        "store": 1.0,
        "store_batch": 1.0,
        "search": 1.0,
        "search_units": 1.0,
    }
    failed = (("error", "InvalidFilterError"), ("method", "search"))
    assert found["memevolve_call_errors_total", failed] == 1.0
    assert found["memevolve_units", ()] == 2.0
    assert found["memevolve_up", ()] == 1.0
    assert found["memevolve_file_bytes", (("file", "database"),)] > 0
    assert view.count() == 1  # the view is one still
    with pytest.raises(ConfigurationError, match="registry"):
        register(store, registry)


def test_the_server_gives_the_figures_of_store_and_requests(client: TestClient) -> None:
    client.post("/v1/units", json={"units": [{"id": "a", "content": "one"}]})
    client.post("/v1/search", json={"query": "one"})
    client.get("/v1/units/a")
    client.get("/v1/units/b")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = figures(answer.text)

    def requests(method: str, route: str, status: int) -> float:
        labels = (("method", method), ("route", route), ("status", str(status)))
        return found["memevolve_http_request_duration_seconds_count", labels]

    assert requests("POST", "/v1/search", 200) == 1
    assert requests("POST", "/v1/units", 201) == 1
    assert requests("GET", "/v1/units/{unit_id}", 200) == requests("GET", "/v1/units/{unit_id}", 404) == 1
    assert found["memevolve_http_requests_in_progress", ()] == 0
    assert found["memevolve_call_duration_seconds_count", (("method", "store"),)] == 1


def test_names_follow_the_conventions_of_prometheus(client: TestClient) -> None:
    client.post("/v1/search", json={"query": "one"})
    for family in text_string_to_metric_families(client.get("/metrics").text):
        assert re.fullmatch(r"memevolve_[a-z_]+", family.name)
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert all(name.endswith(("_total", "_created")) for name in names)
        assert not re.search(r"_(ms|mb|kb|percent|count)$", family.name)


def exported(store: VectorStore) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_calls(store, provider.get_tracer("test"))
    return exporter


def test_spans_name_the_operation_and_hold_no_text(store: VectorStore) -> None:
    exporter = exported(store)
    store.store({"content": "a secret"})
    store.namespace("org", "alice").search("a secret question")
    with pytest.raises(InvalidFilterError):
        store.search("x", filters={"a": {}})
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["upsert_memory memevolve", *["search_memory memevolve"] * 2]
    stored, searched, failed = (dict(span.attributes or {}) for span in spans)
    assert stored["gen_ai.operation.name"] == "upsert_memory"
    assert (stored["db.system.name"], stored["db.operation.name"]) == ("memevolve", "store")
    assert searched["db.namespace"] == "org/alice"
    assert failed["error.type"] == "InvalidFilterError"
    assert spans[2].status.status_code.name == "ERROR"
    assert "secret" not in repr([span.to_json() for span in spans])


def test_nothing_is_wrapped_unless_it_is_asked_for(store: VectorStore) -> None:
    assert type(store).search is VectorStore.search
    register(store, CollectorRegistry())
    assert isinstance(store, VectorStore)
    assert VectorStore.search is not type(store).search
    assert repr(store).startswith("<VectorStore")


@pytest.mark.parametrize("module", ["memevolve_gpu", "memevolve_gpu.cli", "memevolve_gpu.memory_system"])
def test_the_core_imports_nothing_of_the_server(module: str) -> None:
    code = f"import sys, {module}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in (
        "fastapi",
        "uvicorn",
        "starlette",
        "httpx",
        "prometheus_client",
        "opentelemetry",
        "memevolve_gpu.server",
    ):
        assert f"'{name}'" not in loaded, name


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bmemevolve_[a-z_]+\b", expression))


def parsed(expression: str) -> Any:
    """The expression, once the parser of Prometheus' language has read it."""
    promql = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    return promql.parse(expression)


def known_names(client: TestClient) -> set[str]:
    client.post("/v1/search", json={"query": "one"})
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    samples = {sample.name for family in families for sample in family.samples}
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    rare = {"memevolve_recall_probe_ratio"}  # once queries were sampled
    return samples | counters | rare | {family.name for family in families}


def test_the_alert_rules_name_what_exists(client: TestClient) -> None:
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load((OPERATIONS / "alerts.yml").read_text())["groups"]
    known = known_names(client)
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        parsed(rule["expr"])
        assert names_in(rule["expr"]) <= known, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= set(rule["annotations"])


def test_the_dashboard_names_what_exists(client: TestClient) -> None:
    board = json.loads((OPERATIONS / "dashboard.json").read_text())
    known, ids = known_names(client), [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 10
    for panel in board["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
            parsed(expression)
            assert names_in(expression) <= known, panel["title"]
