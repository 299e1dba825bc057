"""Metrics: plain counters in the workers, one Prometheus page in the control process.

Workers count into integers (an increment costs less than a label look-up) and hand out snapshots;
control adds them up, those of workers that are gone included, and renders. Label sets are closed:
providers and operations come from the configuration, codes and outcomes from our own tables. Names
follow OpenTelemetry's GenAI conventions where they have one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

BUCKETS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
"""Seconds; the boundaries that OpenTelemetry advises for `gen_ai.client.operation.duration`."""

_LABELS = ("gen_ai_provider_name", "gen_ai_operation_name", "outcome", "status_class")
_Key = tuple[str, str, str, str]


class _Series:
    __slots__ = ("durations", "first_bytes", "input_tokens", "output_tokens", "seconds")

    def __init__(self) -> None:
        self.durations = [0] * (len(BUCKETS) + 1)
        self.first_bytes = [0] * (len(BUCKETS) + 1)
        self.seconds = [0.0, 0.0]
        self.input_tokens = 0
        self.output_tokens = 0


class CallMetrics:
    """One worker's counts."""

    def __init__(self) -> None:
        self._series: dict[_Key, _Series] = {}
        self._denied: dict[str, int] = {}
        self._would: dict[str, int] = {}
        self._unrecorded_denials = 0

    def observe_call(  # noqa: PLR0913 - one argument for each label and value
        self,
        *,
        provider: str,
        operation: str,
        outcome: str,
        status: int,
        seconds: float,
        first_byte_seconds: float,
        input_tokens: int,
        output_tokens: int,
    ) -> None:
        """Count a call that was forwarded."""
        key = (provider, operation, outcome, f"{status // 100}xx")
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series()
        series.durations[bisect_left(BUCKETS, seconds)] += 1
        series.first_bytes[bisect_left(BUCKETS, first_byte_seconds)] += 1
        series.seconds[0] += seconds
        series.seconds[1] += first_byte_seconds
        series.input_tokens += input_tokens
        series.output_tokens += output_tokens

    def observe_denied(self, code: str) -> None:
        """Count a refusal by its code."""
        self._denied[code] = self._denied.get(code, 0) + 1

    def observe_would(self, verdict: str, rules: Sequence[str]) -> None:
        """Count what rules in shadow would have decided, by the rules that settled it."""
        for rule in rules or ("",):
            key = f"{verdict} {rule}"
            self._would[key] = self._would.get(key, 0) + 1

    def observe_unrecorded_denial(self) -> None:
        """Count a refusal whose audit record could not be written."""
        self._unrecorded_denials += 1

    def snapshot(self, gauges: dict[str, float]) -> dict[str, Any]:
        """Return everything counted so far, and the gauges given, as plain values."""
        return {
            "calls": [
                [
                    list(key),
                    series.durations,
                    series.first_bytes,
                    series.seconds,
                    series.input_tokens,
                    series.output_tokens,
                ]
                for key, series in self._series.items()
            ],
            "denied": self._denied,
            "would": self._would,
            "unrecorded_denials": self._unrecorded_denials,
            "gauges": gauges,
        }


class _Page(Collector):
    def __init__(
        self,
        snapshots: Sequence[dict[str, Any]],
        gauges: dict[str, float],
        protections: Mapping[str, Mapping[str, str]],
        restarts: Mapping[str, int],
        counts: Mapping[str, float],
    ) -> None:
        self._counts = counts
        self._snapshots = snapshots
        self._gauges = gauges
        self._protections = protections
        self._restarts = restarts

    def collect(self) -> Iterable[Metric]:
        yield from self._calls()
        denied = CounterMetricFamily(
            "veklom_denied", "Calls refused by the gateway, by code.", labels=["code"]
        )
        for code, number in _summed(each["denied"] for each in self._snapshots).items():
            denied.add_metric([code], number)
        yield denied
        would = CounterMetricFamily(
            "veklom_policy_would",
            "Calls that rules in shadow would have decided otherwise, by verdict and rule.",
            labels=["verdict", "rule"],
        )
        for key, number in _summed(each["would"] for each in self._snapshots).items():
            would.add_metric(key.split(" "), number)
        yield would
        yield CounterMetricFamily(
            "veklom_unrecorded_denials",
            "Refusals that stood although their record could not be written.",
            value=sum(each["unrecorded_denials"] for each in self._snapshots),
        )
        restarts = CounterMetricFamily(
            "veklom_process_restarts",
            "Processes that died and were started again, by role.",
            labels=["role"],
        )
        for role, number in self._restarts.items():
            restarts.add_metric([role], number)
        yield restarts
        for name, count in self._counts.items():
            yield CounterMetricFamily(f"veklom_{name}", _HELP[name], value=count)
        workers = _summed(each["gauges"] for each in self._snapshots)
        for name, value in sorted({**workers, **self._gauges}.items()):
            yield GaugeMetricFamily(f"veklom_{name}", _HELP.get(name, name), value=value)

        guarded = GaugeMetricFamily(
            "veklom_custody_protection",
            "Whether a protection of keys in memory holds in a process.",
            labels=["process", "protection"],
        )
        for process, reasons in self._protections.items():
            for name, reason in reasons.items():
                guarded.add_metric([process, name], 0 if reason else 1)
        yield guarded

    def _calls(self) -> Iterator[Metric]:
        durations = HistogramMetricFamily(
            "gen_ai_client_operation_duration_seconds",
            "From the call's head to its end.",
            labels=_LABELS,
        )
        first = HistogramMetricFamily(
            "gen_ai_client_operation_time_to_first_chunk_seconds",
            "From sending the request to the provider's first byte.",
            labels=_LABELS,
        )
        tokens = {
            kind: CounterMetricFamily(
                f"gen_ai_client_inference_usage_{kind}_tokens",
                f"{kind.capitalize()} tokens, as providers counted them.",
                labels=_LABELS[:2],
            )
            for kind in ("input", "output")
        }
        spent: dict[tuple[str, str], list[int]] = {}
        for labels, *values in merge(self._snapshots)["calls"]:
            duration, first_byte, (seconds, first_seconds), read, written = values
            durations.add_metric(labels, _cumulative(duration), seconds)
            first.add_metric(labels, _cumulative(first_byte), first_seconds)
            used = spent.setdefault((labels[0], labels[1]), [0, 0])
            used[0] += read
            used[1] += written
        for where, (read, written) in spent.items():
            tokens["input"].add_metric(where, read)
            tokens["output"].add_metric(where, written)
        yield durations
        yield first
        yield from tokens.values()


_HELP = {
    "connections": "Callers connected.",
    "live_calls": "Calls that are with a provider.",
    "upstream_connections_busy": "Connections to providers that carry a call.",
    "buffered_bytes": "Bytes of request bodies held.",
    "audit_pending_events": "Audit events that are not durable yet.",
    "audit_durable_events": "Audit events written since the start.",
    "audit_failed": "Audit logs that have failed; calls are refused.",
    "audit_short": "Audit logs with only the reserve left of their disk; no new call begins.",
    "audit_lost_events": "Events that the mode `async` let go unrecorded, and the log does not say yet.",
    "sessions_open": "Open sessions; in a fleet, those that this gateway has served.",
    "store_up": "Whether sessions of the shared store are served.",
    "store_silent_seconds": "How long ago the shared store was last heard.",
    "store_errors": "Questions that the shared store did not answer.",
    "store_forged": "Things in the shared store that no replica left there, and that were refused.",
    "limits_store_up": "Workers whose store of limits answers.",
    "limits_calls_held": "Running calls that hold something of a limit.",
    "limits_budget_keys": "Budgets that are counted in memory, by key and window.",
    "limits_calls_unsettled": "Calls that ended while the store of limits was away, and wait for it.",
    "limits_calls_degraded": "Calls since the workers' start whose limits the store did not count.",
    "limits_settlements_lost": "Ends of calls since the workers' start that the store never heard of.",
    "policies_refused": "Whether changed policies were refused, so that older ones are in force.",
    "workers_ready": "Workers that serve.",
    "kills_standing": "Kills that operators have placed and not lifted.",
}


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, number in zip([*map(str, BUCKETS), "+Inf"], counts, strict=True):
        total += number
        buckets.append((bound, float(total)))
    return buckets


def _summed(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in counts:
        for key, number in each.items():
            total[key] = total.get(key, 0) + number
    return total


def merge(snapshots: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one snapshot with the sums of the counters; gauges say what is, so they are left out."""
    calls: dict[_Key, list[Any]] = {}
    for snapshot in snapshots:
        for key, durations, first_bytes, seconds, read, written in snapshot["calls"]:
            held = calls.setdefault(tuple(key), [*_NO_CALLS])
            held[0] = _added(held[0], durations)
            held[1] = _added(held[1], first_bytes)
            held[2] = _added(held[2], seconds)
            held[3] += read
            held[4] += written
    return {
        "calls": [[list(key), *values] for key, values in calls.items()],
        "denied": _summed(each["denied"] for each in snapshots),
        "would": _summed(each["would"] for each in snapshots),
        "unrecorded_denials": sum(each["unrecorded_denials"] for each in snapshots),
        "gauges": {},
    }


_NO_CALLS: Final = ([0] * (len(BUCKETS) + 1), [0] * (len(BUCKETS) + 1), [0.0, 0.0], 0, 0)


def _added(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def render(
    snapshots: Sequence[dict[str, Any]],
    gauges: dict[str, float],
    protections: Mapping[str, Mapping[str, str]],
    restarts: Mapping[str, int],
    counts: Mapping[str, float],
) -> bytes:
    """Return the Prometheus page for the workers' snapshots and the control process's figures.

    `protections` names, for each process, what should guard keys, and why not where it does not;
    `restarts` counts them by kind of process; `counts` are control's own counters.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(snapshots, gauges, protections, restarts, counts))
    return generate_latest(registry)
