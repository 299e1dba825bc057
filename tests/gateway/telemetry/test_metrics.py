"""Counts of several workers add up to one page that Prometheus reads, with closed label sets."""

from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.metrics import CallMetrics, merge, render


def counted(calls: int, *, seconds: float = 0.03) -> dict[str, object]:
    """Return the snapshot of a worker that carried so many calls."""
    metrics = CallMetrics()
    for _ in range(calls):
        metrics.observe_call(
            provider="openai", operation="chat", outcome="complete", status=200, seconds=seconds,
            first_byte_seconds=0.01, input_tokens=5, output_tokens=7,
        )  # fmt: skip
    metrics.observe_denied("policy_denied")
    return metrics.snapshot({"connections": 2.0})


def samples(page: bytes) -> dict[str, float]:
    """Return the values of a page by name and the labels that tell them apart."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            extra = sample.labels.get("le") or sample.labels.get("code") or ""
            found[sample.name + (f"[{extra}]" if extra else "")] = sample.value
    return found


def test_workers_add_up() -> None:
    """The page shows the sum of all workers, and parses as Prometheus text."""
    page = samples(
        render([counted(2), counted(3, seconds=200.0)], {"sessions_open": 4.0}, {}, {}, {})
    )
    duration = "gen_ai_client_operation_duration_seconds"
    assert page[f"{duration}_count"] == 5
    assert page[f"{duration}_bucket[0.02]"] == 0
    assert page[f"{duration}_bucket[0.04]"] == 2
    assert page[f"{duration}_bucket[81.92]"] == 2
    assert page[f"{duration}_bucket[+Inf]"] == 5
    assert page[f"{duration}_sum"] == 2 * 0.03 + 3 * 200
    assert page["gen_ai_client_inference_usage_input_tokens_total"] == 25
    assert page["gen_ai_client_inference_usage_output_tokens_total"] == 35
    assert page["veklom_denied_total[policy_denied]"] == 2
    assert page["veklom_connections"] == 4
    assert page["veklom_sessions_open"] == 4


def test_an_idle_gateway_has_a_page() -> None:
    """Before the first call the page is there, and counts nothing."""
    page = samples(render([CallMetrics().snapshot({})], {}, {}, {}, {}))
    assert page["veklom_unrecorded_denials_total"] == 0


def test_a_merged_snapshot_counts_the_same() -> None:
    """What workers that are gone had counted adds up like theirs did; what they held does not."""
    apart = samples(render([counted(2), counted(3, seconds=200.0)], {}, {}, {}, {}))
    merged = merge([counted(2), counted(3, seconds=200.0)])
    together = samples(render([merged], {}, {}, {}, {}))
    assert apart.pop("veklom_connections") == 4
    assert together == apart
    assert merge([merge([]), merged]) == merged


def test_restarts_are_counted_by_role() -> None:
    """Processes that died and were started again are a counter with a role."""
    page = render([], {}, {}, {"worker": 2}, {}).decode()
    assert 'veklom_process_restarts_total{role="worker"} 2.0' in page
