"""One log line for each request, and one for each failed attempt. Prompts and backends' own words are never logged."""

from __future__ import annotations

import logging
from typing import Any

from xgen_proxy.errors import RequestRejectedError, UpstreamError
from xgen_proxy.forwarding.outcome import Observer, Outcome, Refusal
from xgen_proxy.observability.logging_setup import log_event
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target


class RequestLog(Observer):
    """Writes the lines."""

    def request_refused(self, refusal: Refusal) -> None:
        """Leaves out the message, which may repeat what the client sent."""
        origin, error = refusal.origin, refusal.error
        line: dict[str, Any] = {
            "request_id": origin.request_id,
            "endpoint": refusal.endpoint,
            "status": error.status,
            "code": error.code or error.type,
        }
        if origin.client is not None:
            line["client"] = origin.client
        if origin.key is not None:
            line["key"] = origin.key
        log_event(logging.INFO, "refused", line)

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        if isinstance(error, UpstreamError):
            line = {
                "request_id": call.id,
                "replica": target.replica.name,
                "outcome": error.outcome,
                "error": error.reason,
            }
            log_event(logging.WARNING, "attempt failed", line)

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        if outcome.first_choice is not None:
            log_event(logging.INFO, "request", request_line(call, outcome))
        elif outcome.error is not None:
            self.request_refused(Refusal(call.origin, call.features.endpoint, outcome.error))


def request_line(call: Call, outcome: Outcome) -> dict[str, Any]:
    """The fields of a request's log line. Unknown values are left out."""
    features, origin, target = call.features, call.origin, outcome.target
    line: dict[str, Any] = {
        "request_id": call.id,
        "endpoint": features.endpoint,
        "model": call.model,
        "stream": features.stream,
        "prompt_words": features.prompt_words,
        "status": outcome.status,
        "attempts": outcome.attempts,
        "duration_s": _rounded(outcome.finished - call.started),
    }
    if features.alias is not None:
        line["alias"] = features.alias.pattern
    if origin.client is not None:
        line["client"] = origin.client
    if origin.key is not None:
        line["key"] = origin.key
    if target is not None:
        line["backend"] = target.backend.name
        line["replica"] = target.replica.name
        line["reason"] = target.reason
        if target.distance:
            line["model_distance"] = target.distance
    if outcome.first_output:
        line["ttft_s"] = _rounded(outcome.first_output - call.started)
    if outcome.usage is not None:
        line["tokens_in"], line["tokens_out"] = outcome.usage
    if outcome.bytes_sent is not None:
        line["bytes_out"] = outcome.bytes_sent
    if outcome.queued:
        line["queue_s"] = _rounded(outcome.queued)
    if outcome.error is not None or outcome.failures:
        line |= _failure_fields(outcome)
    return line


def _rounded(seconds: float) -> float:
    return int(seconds * 1e4) / 1e4  # a third of the cost of round()


def _failure_fields(outcome: Outcome) -> dict[str, Any]:
    """Only our own words: a backend's may repeat the prompt."""
    line: dict[str, Any] = {}
    error = outcome.error
    if error is not None:
        line["code"] = "refused" if isinstance(error, RequestRejectedError) else error.code or error.type
    if outcome.failures:
        line["failed"] = [
            {"replica": failure.target.replica.name, "outcome": failure.error.outcome} for failure in outcome.failures
        ]
    if outcome.resumed:
        line["continued"] = outcome.resumed
    if outcome.interrupted is not None:
        line["broken"] = outcome.interrupted.reason
    return line
