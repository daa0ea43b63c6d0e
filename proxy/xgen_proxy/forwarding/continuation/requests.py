"""The requests that make another replica go on with an answer, or give it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.forwarding.continuation.sent import BLANK, SentPrefix
from xgen_proxy.request.features import Features, Json
from xgen_proxy.request.prompt import estimate_tokens

CONSTRAINED = frozenset({"json_object", "json_schema", "grammar", "structured_outputs"})
TOOLS = frozenset({"tools", "forced_tool"})
BLOCKS = CONSTRAINED | TOOLS  # the answer has a part that its client cannot use before it is complete
# All other needs of a request are about single tokens or several answers, which do not go on in a text.
RESUMABLE_NEEDS = frozenset({"generation", "images", "audio", "video", "files"}) | BLOCKS
PREFILLED = ("continue_final_message", "add_generation_prompt")


def why_not_resumable(features: Features, body: Json) -> str | None:
    """Why a stream for this request must not be resumed, or None if it may be."""
    if not features.continuation:
        return "the client opted out"
    needs = features.needs - RESUMABLE_NEEDS
    if needs:
        return f"an answer with {', '.join(sorted(needs))} cannot be resumed"
    if features.endpoint == "chat":
        if prefill(body):
            return None
        if body["messages"][-1].get("role") == "assistant":
            return "whether the answer goes on after the client's own words depends on the engine"
    if any(body.get(field) is not None for field in PREFILLED):
        return "the client sets how the prompt ends"
    return None


def prefill(chat: Json) -> str:
    """The client's own words that the answer goes on after. Without the flags, some engines begin a new message."""
    last = chat["messages"][-1]
    flags = tuple(chat.get(field) for field in PREFILLED)
    if last.get("role") != "assistant" or "tool_calls" in last or flags != (True, False):
        return ""
    return last["content"] if isinstance(last.get("content"), str) else ""


def can_take_over(dialect: Dialect, features: Features, prefix: SentPrefix, template: ChatTemplate | None) -> bool:
    """Whether a backend of this dialect can go on with the answer or give it again."""
    if prefix.reasoning and not dialect.separates_reasoning:
        return False  # the rest of the reasoning would come as text
    return may_repeat(features, prefix) or dialect.can_resume(features, template)


def may_repeat(features: Features, prefix: SentPrefix) -> bool:
    """Whether the whole answer may be asked for again.

    If text was shown, the new answer must begin with it. That is likely for constrained output only, and the last
    resort where an engine refuses to go on after its reasoning.
    """
    return prefix.empty or bool(prefix.reasoning) or not features.needs.isdisjoint(CONSTRAINED)


def continuing_requests(
    dialect: Dialect, request: BackendRequest, prefix: SentPrefix, left: int | None, template: ChatTemplate | None
) -> Sequence[BackendRequest]:
    """Requests that go on after the sent prefix with at most `left` tokens, the likeliest to work first. None if the
    engine cannot start in the middle of such an answer.

    If `left` is 0 and only the usage is still to be sent, one token is generated and dropped.
    Raises UpstreamProtocolError if the chat template fails.
    """
    features = request.features
    constrained = features.needs & CONSTRAINED
    if prefix.empty or (prefix.text and constrained - dialect.resumes_constrained):
        return ()
    if constrained and features.endpoint == "completions":
        return ()
    if not dialect.can_resume(features, template):
        return ()
    request = _within(request, prefix, left)
    if features.endpoint == "completions":
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


def _within(request: BackendRequest, prefix: SentPrefix, left: int | None) -> BackendRequest:
    """The request with what is left of its limits. If that may exceed this engine's context, it is not believed: an
    answer that ends early is better than one that breaks off."""
    body, features = dict(request.body), request.features
    prompt = features.prompt_tokens + estimate_tokens(prefix.reasoning + prefix.text)
    features = replace(features, prompt_tokens=prompt)
    if left is not None:
        body["max_tokens"] = limit = max(left, 1)
        body.pop("max_completion_tokens", None)
        fits = request.context is None or prompt + limit <= request.context
        features = replace(features, max_tokens=limit, max_tokens_believed=features.max_tokens_believed and fits)
    if body.get("min_tokens"):
        body["min_tokens"] = max(0, body["min_tokens"] - prefix.pieces)
    return replace(request, features=features, body=body, raw=None)


def usage_request(request: BackendRequest) -> BackendRequest:
    """The request whose usage counts the prompt. It generates one token, which is dropped."""
    return _within(request, SentPrefix({}, "", 0, None, False), 1)
