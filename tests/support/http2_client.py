"""An HTTP/2 connection on which a test sends any frame, well-formed or not."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import cast

import h2.config
import h2.connection
import h2.events
from h2.settings import SettingCodes

Headers = list[tuple[str, str]]
ENDS = (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)


class H2:
    """An HTTP/2 client on a TLS socket that has negotiated h2. Outgoing headers are not validated."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        assert sock.selected_alpn_protocol() == "h2"
        self.sock = sock
        self.early: list[h2.events.Event] = []  # received before next() was called
        config = h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding="utf-8"
        )
        self.connection = h2.connection.H2Connection(config)
        self.connection.initiate_connection()
        self.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
        self.flush()

    def __enter__(self) -> H2:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.sock.close()

    def flush(self) -> None:
        self.sock.sendall(self.connection.data_to_send())

    def request(self, path: str, body: bytes | None = None, extra: Headers | None = None, end: bool = True) -> int:
        """Returns the stream's id. A POST if there is a body, else a GET."""
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", "GET" if body is None else "POST"), (":scheme", "https"), (":authority", "localhost")]
        head += [(":path", path), ("content-type", "application/json"), *(extra or [])]
        self.connection.send_headers(stream, head, end_stream=body is None and end)
        if body is not None:
            self.connection.send_data(stream, body, end_stream=end)
        self.flush()
        return stream

    def reset(self, stream: int) -> None:
        self.connection.reset_stream(stream)
        self.flush()

    def upload(self, stream: int, size: int) -> None:
        """A body of `size` bytes as fast as it is taken, until it is through or the other side ends the stream."""
        while size:
            room = min(size, self.connection.local_flow_control_window(stream), self.connection.max_outbound_frame_size)
            if room:
                self.connection.send_data(stream, b" " * room, end_stream=room == size)
                self.flush()
                size -= room
            else:
                events = self.next()
                if events is None or any(isinstance(event, h2.events.ResponseReceived) for event in events):
                    self.early += events or []
                    return

    def next(self) -> list[h2.events.Event] | None:
        """The next events; None once the peer has closed."""
        if self.early:
            events, self.early = self.early, []
            return events
        data = self.sock.recv(65536)
        if not data:
            return None
        events = self.connection.receive_data(data)
        self.flush()
        return events

    def status(self, stream: int) -> int | None:
        """Read a response to its end and return its status; None if the stream was reset or the connection ended."""
        status = None
        while (events := self.next()) is not None:
            for event in events:
                if isinstance(event, h2.events.ResponseReceived) and event.stream_id == stream:
                    status = int(dict(cast(Headers, event.headers))[":status"])  # str, by header_encoding
                ours = getattr(event, "stream_id", stream) == stream
                if ours and isinstance(event, ENDS):
                    return status if isinstance(event, h2.events.StreamEnded) else None
        return None
