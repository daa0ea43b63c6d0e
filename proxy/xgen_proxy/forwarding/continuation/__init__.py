"""What it takes to continue the answer of a broken stream; no I/O of its own.

    request ──▶ Hold: what of a stream is held back, since the client cannot use it in part
    events sent so far ──▶ SentPrefix: text, reasoning, id, finish        may it be resumed?  why_not_resumable()
    SentPrefix + dialect ──▶ the requests that go on after it, or ask again        continuing_requests(), may_repeat()
    their events ──▶ events of the stream that broke        ResumedStream

How an engine continues a chat is its dialect's business: `Dialect.resume_chat`, `Dialect.resume_reasoning`.
"""
