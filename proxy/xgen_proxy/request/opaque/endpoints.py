"""The opaque endpoints: what they are called, which capability they need, and where their text is."""

from __future__ import annotations

from xgen_proxy.request.features import Endpoint, Need
from xgen_proxy.values import frozen


@frozen
class OpaqueEndpoint:
    """`path`: the route, here and at the backend. `texts`: the fields whose texts the model reads; a list in one of
    them is so many sequences to the engine. `chat`: the model reads the field `messages`, too, as one sequence.
    `form`: the body is a multipart form, with a file."""

    path: str
    need: Need
    texts: tuple[str, ...] = ()
    chat: bool = False
    form: bool = False


# /tokenize and /detokenize cost an engine next to nothing, so that their texts are no reason to prefer a GPU.
OPAQUE: dict[Endpoint, OpaqueEndpoint] = {
    "rerank": OpaqueEndpoint("/v1/rerank", "rerank", ("query", "documents")),
    "score": OpaqueEndpoint(
        "/v1/score", "score", ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2")
    ),
    "classify": OpaqueEndpoint("/classify", "classify", ("input",), chat=True),
    "tokenize": OpaqueEndpoint("/tokenize", "tokenize"),
    "detokenize": OpaqueEndpoint("/detokenize", "tokenize"),
    "transcriptions": OpaqueEndpoint("/v1/audio/transcriptions", "transcriptions", form=True),
    "translations": OpaqueEndpoint("/v1/audio/translations", "translations", form=True),
}
