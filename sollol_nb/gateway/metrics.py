"""`/metrics`, for Prometheus: the requests so far, and the present use of the cluster.

Answers are measured under the names of OpenTelemetry's conventions for generative AI, with its buckets, in seconds
and tokens (https://github.com/open-telemetry/semantic-conventions-genai). Labels:

- `gen_ai_provider_name`: the backend that answered, as in `_routing`; "" where the request reached none.
- `gen_ai_request_model`: the model's name. "" where the request reached no backend, so that clients cannot create
  time series, and beyond `MAX_MODELS` names.
- `error_type`: `ApiError.kind`, or `cancelled` where the client disconnected; "" for a complete answer.

A scrape contacts no engine: it shows the last known state of workers, slots and queues.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import exposition as text_format
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.router.router import Router
from sollol_nb.text.short_names import short_name

MAX_MODELS = 200

_DURATION_S = tuple(0.01 * 2**step for step in range(14))
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4**power for power in range(14))
_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIXES = {"/api/": "ollama", "/v1/messages": "anthropic", "/v1/": "openai", "/sollol/": "notebook"}


class Metrics:
    """The metrics of one gateway.

    Args:
        router: of the cluster to show.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self.registry = registry = CollectorRegistry()
        self._models: set[str] = set()
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request to the last token.",
            (*_LABELS, "error_type"),
            buckets=_DURATION_S,
            registry=registry,
        )
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to the first token of complete answers; waiting and loading count.",
            _LABELS,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time of each token after the first one of complete answers.",
            _LABELS,
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage",
            "Tokens of a request.",
            (*_LABELS, "gen_ai_token_type"),
            buckets=_TOKENS,
            registry=registry,
        )
        self._responses = Counter(
            "sollol_http_responses",
            "HTTP responses; status 0 where the client disconnected before there was one.",
            ("api", "status"),
            registry=registry,
        )
        self._failovers = Counter(
            "sollol_failovers",
            "Servers that were lost within an answer.",
            ("gen_ai_provider_name",),
            registry=registry,
        )
        self._cluster = _Cluster()
        registry.register(self._cluster)
        ProcessCollector(registry=registry)

    async def answer(self, request: Request) -> Response:
        """All metrics, in OpenMetrics' form if the client accepts it."""
        self._cluster.status = await self._router.status()
        form: ModuleType
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            form, content_type = openmetrics, openmetrics.CONTENT_TYPE_LATEST
        else:
            form, content_type = text_format, _TEXT_TYPE
        return Response(form.generate_latest(self.registry), headers={"Content-Type": content_type})

    def add(self, finished: FinishedRequest) -> None:
        """Count a request that has ended."""
        record = finished.answer
        api = record.api if record is not None else _api_of(finished.path)
        self._responses.labels(api, str(finished.status)).inc()
        if record is None:
            return
        routing = record.routing
        backend = str(routing.get("backend") or "")
        labels = (record.operation, backend, self._model(record.model) if backend else "")
        self._duration.labels(*labels, record.error_kind).observe(finished.duration_s)
        for token_type, count in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            if count is not None:
                self._tokens.labels(*labels, token_type).observe(count)
        if failovers := routing.get("failovers"):
            self._failovers.labels(backend).inc(len(failovers))
        first_ms = routing.get("ttft_ms")
        if record.error_kind or first_ms is None:
            return
        self._first_token.labels(*labels).observe(first_ms / 1000)
        if record.completion_tokens and record.completion_tokens > 1:
            rest_s = max(0.0, finished.duration_s - first_ms / 1000)
            self._per_token.labels(*labels).observe(rest_s / (record.completion_tokens - 1))

    def _model(self, model: str) -> str:
        """The name of a model as a label."""
        name = short_name(model)
        if name not in self._models and len(self._models) >= MAX_MODELS:
            return ""
        self._models.add(name)
        return name


class _Cluster(Collector):
    """The last known state of the cluster, as metrics.

    Attributes:
        status: the cluster then.
    """

    status = ClusterStatus((), ())

    def collect(self) -> Iterator[Metric]:
        """The metrics of slots, queues, workers and coordinators."""
        status = self.status
        coordinators = [coordinator for coordinator in status.coordinators if not coordinator.standby]
        standbys = Counts((each.model, each.standby) for each in status.coordinators if each.standby)
        places: list[tuple[str, str, Any]] = [
            *(("llama.cpp", coordinator.model, coordinator) for coordinator in coordinators),
            *(("ollama", "", node) for node in status.nodes),
        ]
        labels = ("backend", "place", "model")
        waiting = GaugeMetricFamily("sollol_requests_waiting", "Requests that wait for a slot.", labels=labels)
        running = GaugeMetricFamily("sollol_requests_running", "Requests that have a slot.", labels=labels)
        slots = GaugeMetricFamily("sollol_slots", "Slots of engines by state.", labels=(*labels, "state"))
        for backend, model, place in places:
            values = (backend, place.url, model)
            waiting.add_metric(values, place.waiting)
            running.add_metric(values, place.running)
            slots.add_metric((*values, "used"), min(place.running, place.slots))
            slots.add_metric((*values, "free"), max(0, place.slots - place.running))
        workers = GaugeMetricFamily("sollol_workers", "Workers by state.", labels=("state",))
        for state, count in Counts(worker.state for worker in status.workers).items():
            workers.add_metric((state,), count)
        running_ones = GaugeMetricFamily("sollol_coordinators", "Running coordinators.", value=len(coordinators))
        ready = GaugeMetricFamily("sollol_standbys", "Standbys by state.", labels=("model", "state"))
        for (model, state), count in standbys.items():
            ready.add_metric((model, state), count)
        yield from (waiting, running, slots, workers, running_ones, ready)


def _api_of(path: str) -> str:
    return next((api for prefix, api in _PREFIXES.items() if path.startswith(prefix)), "")


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The route of a gateway, whose requests are counted from now on."""
    metrics = Metrics(gateway.router)
    gateway.on_finished.append(metrics.add)

    return [Route("/metrics", metrics.answer, methods=["GET"])]
