"""The record of a request becomes its latency row: what the plots and frames need is in it."""

from __future__ import annotations

import json

from sollol_nb.latency.schema import LatencyRow
from sollol_nb.router.record import RequestRecord

FINAL = {
    "message": {"content": "."},
    "done": True,
    "done_reason": "length",
    "prompt_eval_count": 7,
    "eval_count": 20,
    "eval_duration": 500_000_000,
}


def test_an_answer_that_continued_on_another_engine_measures_neither() -> None:
    record = RequestRecord("m")
    record.add_failover("new layout", 5)
    record.add_chunk(FINAL)

    assert record.tokens_per_s is not None
    assert record.token_ms is None


def test_an_engine_that_continues_has_no_more_of_the_prompt_cached_than_there_is() -> None:
    record = RequestRecord("m")
    record.add_chunk({**FINAL, "_cached": {"cached_tokens": 65, "restored_tokens": 60, "context_note": ""}})

    assert (record.cached_tokens, record.restored_tokens) == (7, 7)


def test_row_of_an_answer_has_the_figures_of_its_last_chunk_and_plan() -> None:
    record = RequestRecord("m")
    record.priority = 8
    record.plan = {"predicted_token_ms": 24.5}
    record.add_chunk({"message": {"content": "half"}})
    record.add_chunk(FINAL)

    row = record.row("ok")

    assert (row.priority, row.done_reason, row.predicted_ms_per_token) == (8, "length", 24.5)
    assert (row.prompt_tokens, row.completion_tokens, row.tokens_per_s) == (7, 20, 38.0)
    assert (row.failovers, row.failover_details, row.partial_text) == (0, "", "")


def test_row_of_a_request_that_was_refused_is_empty_where_nothing_applies() -> None:
    row = RequestRecord("m").row("error", "no such model")

    assert (row.status, row.error, row.partial_text) == ("error", "no such model", "")
    assert (row.priority, row.done_reason, row.predicted_ms_per_token, row.failover_details) == (
        None,
        "",
        None,
        "",
    )


def test_plan_without_a_prediction_leaves_it_out() -> None:
    record = RequestRecord("m")
    record.plan = {"strategy": "even"}

    assert record.row("ok").predicted_ms_per_token is None


def test_row_has_the_details_of_failovers() -> None:
    record = RequestRecord("m")
    record.set_sent()
    record.add_chunk({"message": {"content": "half"}})
    record.add_failover("the coordinator ended", 3)
    record.set_lost_workers(["b:2", "a:1"])
    record.add_chunk({"message": {"content": " more"}})

    row = record.row("cancelled")

    (failover,) = json.loads(row.failover_details)
    assert row.failovers == 1
    assert row.partial_text == "half more"
    assert failover == record.routing()["failovers"][0]
    assert (failover["what"], failover["tokens_before"]) == ("the coordinator ended", 3)
    assert failover["lost_workers"] == ["a:1", "b:2"]
    assert isinstance(row, LatencyRow)


def test_routing_of_a_chunk_does_not_change_later() -> None:
    record = RequestRecord("m")
    record.set_sent()
    routing = record.routing()
    record.add_failover("the coordinator ended", 3)

    assert routing["failovers"] == []
    assert len(record.routing()["failovers"]) == 1


def test_time_that_ollama_needs_after_the_request_was_sent_does_not_reduce_the_router_overhead() -> None:
    record = RequestRecord("m")
    record.set_sent()
    overhead_ms = record.router_overhead_ms
    record.set_node({"node": "http://a:1", "queue_ms": 1e6, "load_ms": 1e6, "failovers": []})

    assert record.row("ok").router_overhead_ms == overhead_ms
    assert overhead_ms is not None
    assert overhead_ms > 0


def test_failovers_that_a_node_reports_twice_count_once() -> None:
    record = RequestRecord("m")
    for _ in range(2):
        record.set_node({"node": "http://b:1", "failovers": [{"what": "a was lost"}]})

    assert record.row("ok").failovers == 1
