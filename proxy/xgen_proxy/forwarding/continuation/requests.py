"""The requests that make another replica go on with an answer, or give it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import MAX_TOKENS_BEYOND_CONTEXT, room_beside
from xgen_proxy.forwarding.continuation.sent import BLANK, SentPrefix, tokens_left
from xgen_proxy.request.features import Features, Json

CONSTRAINED = frozenset({"json_object", "json_schema", "grammar", "structured_outputs"})
TOOLS = frozenset({"tools", "forced_tool"})
BLOCKS = CONSTRAINED | TOOLS  # the answer has a part that its client cannot use before it is complete
# All other needs of a request are about single tokens or several answers, which do not go on in a text.
RESUMABLE_NEEDS = frozenset({"generation", "images", "audio", "video", "files"}) | BLOCKS
PREFILLED = ("continue_final_message", "add_generation_prompt")
PER_TOKEN = ("return_token_ids", "prompt_logprobs", "n_probs")  # what they ask for would be missing after the break
BUDGETS = frozenset({"thinking_token_budget", "thinking_budget_tokens", "reasoning_budget_tokens"})


def why_not_resumable(features: Features, body: Json) -> str | None:
    """Why a stream for this request must not be resumed, or None if it may be."""
    if not features.continuation:
        return "the client opted out"
    needs = features.needs - RESUMABLE_NEEDS
    if needs:
        return f"an answer with {', '.join(sorted(needs))} cannot be resumed"
    for field in PER_TOKEN:
        if body.get(field):
            return f"an answer with {field} cannot be resumed"
    if body.get("stop") and body.get("include_stop_str_in_output"):
        return "the client may have half a stop string, which no other engine would complete"
    if features.endpoint == "chat":
        if prefill(body):
            return None
        if body["messages"][-1].get("role") == "assistant":
            return "whether the answer goes on after the client's own words depends on the engine"
    if any(body.get(field) is not None for field in PREFILLED):
        return "the client sets how the prompt ends"
    return None


def prefill(chat: Json) -> str:
    """The text that the client wrote for the model to continue. Without the flags, some engines begin a new message."""
    last = chat["messages"][-1]
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        return ""
    flags = tuple(chat.get(field) for field in PREFILLED)
    others = [field for field in last if field not in ("role", "content") and last[field] is not None]
    return "" if others or flags != (True, False) else str(last["content"])


def can_take_over(dialect: Dialect, features: Features, prefix: SentPrefix, template: ChatTemplate | None) -> bool:
    """Whether a backend of this dialect can go on with the answer or give it again."""
    if prefix.reasoning and not dialect.separates_reasoning:
        return False  # the rest of the reasoning would come as text
    return may_repeat(features, prefix) or dialect.can_resume(features, template)


def may_repeat(features: Features, prefix: SentPrefix) -> bool:
    """Whether the whole answer may be asked for again.

    If text was sent, the new answer must begin with it. That is likely for constrained output only, and the last
    resort where an engine refuses to go on after its reasoning.
    """
    return prefix.empty or bool(prefix.reasoning) or not features.needs.isdisjoint(CONSTRAINED)


def continuing_requests(
    dialect: Dialect, request: BackendRequest, prefix: SentPrefix, spent: int, template: ChatTemplate | None
) -> Sequence[BackendRequest]:
    """Requests that go on after the sent prefix of `spent` tokens, the likeliest to work first. Empty if the engine
    cannot start in the middle of such an answer.

    If no token is left and only the usage is still to be sent, one token is generated and dropped.
    Raises UnsupportedByBackendError if the chat template fails.
    """
    features = request.features
    constrained = features.needs & CONSTRAINED
    if prefix.empty or (prefix.text and constrained - dialect.resumes_constrained):
        return ()
    if constrained and features.endpoint == "completions":
        return ()
    if not dialect.can_resume(features, template):
        return ()
    limited = [_within(request, spent, limit) for limit in limits_to_try(dialect, request, spent)]
    return tuple(asked for each in limited for asked in _after(dialect, each, prefix, template))


def _after(
    dialect: Dialect, request: BackendRequest, prefix: SentPrefix, template: ChatTemplate | None
) -> Sequence[BackendRequest]:
    """The request with what was sent at its end, in the ways that the engine may understand."""
    if prefix.text:
        body = {name: value for name, value in request.body.items() if name not in BUDGETS}
        request = replace(request, body=body)
    if request.features.endpoint == "completions":
        prompt = request.body["prompt"]
        text = (prompt[0] if isinstance(prompt, list) else prompt) + prefix.partial
        return (replace(request, body={**request.body, "prompt": text}),)
    if words := prefill(request.body):
        if prefix.reasoning:
            return ()
        body = {name: value for name, value in request.body.items() if name not in PREFILLED}
        before = replace(request, body={**body, "messages": body["messages"][:-1]})
        return (dialect.resume_chat(before, words + prefix.partial, template),)
    if prefix.reasoning:
        reasoning = prefix.reasoning.rstrip(BLANK) if prefix.in_reasoning else prefix.reasoning
        return dialect.resume_reasoning(request, reasoning, None if prefix.in_reasoning else prefix.partial)
    if not prefix.partial:
        return (request,)
    return (
        dialect.resume_chat(request, prefix.partial, template),
        *dialect.resume_reasoning(request, "", prefix.partial),
    )


def limits_to_try(dialect: Dialect, request: BackendRequest, spent: int) -> list[int | None]:
    """How many tokens to ask for: what is left; and if that may exceed the context of an engine that then refuses, what
    fits by estimate, since an answer that ends early is better than one that breaks off."""
    left, features = tokens_left(request.features, spent), request.features
    if left is None:
        return [None]
    left = max(left, 1)
    if MAX_TOKENS_BEYOND_CONTEXT not in dialect.rules:  # it ends the answer where its context ends
        return [left]
    if request.context is None or features.prompt_tokens + spent + left <= request.context:
        return [left]
    fitting = min(left, max(room_beside(features.prompt_tokens, request.context - spent), 1))
    return [left, fitting] if left <= request.context and features.max_tokens_believed else [fitting]


def _within(request: BackendRequest, spent: int, limit: int | None) -> BackendRequest:
    """The request with what is left of its limits."""
    body, features = dict(request.body), request.features
    if limit is not None:
        body["max_tokens"] = limit
        body.pop("max_completion_tokens", None)
        features = replace(features, max_tokens=limit, max_tokens_believed=True)
    if body.get("min_tokens"):
        least = max(0, body["min_tokens"] - spent)
        body["min_tokens"] = least if limit is None else min(least, limit)
    return replace(request, features=features, body=body, raw=None)


def usage_request(request: BackendRequest) -> BackendRequest:
    """The request whose usage counts the prompt. It generates one token, which is dropped."""
    body = {name: value for name, value in request.body.items() if name != "min_tokens"}
    return _within(replace(request, body=body), 0, 1)
