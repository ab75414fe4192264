"""The record of a request becomes its latency row: what the plots and frames need is in it."""

from __future__ import annotations

import json

from sollol_nb.latency_schema import LatencyRow
from sollol_nb.request_record import RequestRecord

FINAL = {
    "message": {"content": "."},
    "done": True,
    "done_reason": "length",
    "prompt_eval_count": 7,
    "eval_count": 20,
    "eval_duration": 500_000_000,
}


def test_row_of_an_answer_has_what_its_last_chunk_and_its_plan_tell() -> None:
    record = RequestRecord("m")
    record.priority = 8
    record.plan = {"predicted_token_ms": 24.5}
    record.saw({"message": {"content": "half"}})
    record.saw(FINAL)

    row = record.row("ok")

    assert (row.priority, row.done_reason, row.predicted_ms_per_token) == (8, "length", 24.5)
    assert (row.prompt_tokens, row.completion_tokens, row.tokens_per_s) == (7, 20, 40.0)
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


def test_failovers_are_told_in_detail() -> None:
    record = RequestRecord("m")
    record.sent()
    record.saw({"message": {"content": "half"}})
    record.lose("the coordinator ended", 3)
    record.lost_workers(["b:2", "a:1"])
    record.goes_on()

    row = record.row("cancelled")

    (told,) = json.loads(row.failover_details)
    assert row.failovers == 1
    assert row.partial_text == "half"
    assert told == record.routing()["failovers"][0]
    assert (told["what"], told["tokens_before"]) == ("the coordinator ended", 3)
    assert told["lost_workers"] == ["a:1", "b:2"]
    assert isinstance(row, LatencyRow)
