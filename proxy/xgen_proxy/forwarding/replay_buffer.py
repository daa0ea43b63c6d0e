"""The events that a stream's client has been sent, kept so that the stream can be resumed elsewhere if it breaks.

While an answer is short, as most are, this is a list of references: adding events copies nothing. Beyond FOLD bytes
the blocks are compressed to about a fifteenth, since chunks repeat themselves. The contract: `all()` returns what was
added, byte for byte, until `overflowed`.
"""

from __future__ import annotations

import zlib

FOLD = 64 * 1024  # bytes kept as they are
LIMIT = 16 * 1024 * 1024  # bytes of events, some 60,000 tokens; a longer answer cannot be resumed


class ReplayBuffer:
    """`add()` is called for every chunk and does next to nothing; `all()` is called only when a stream has broken.

    `size` and `count` cover everything added, also after an overflow.
    """

    __slots__ = ("_blocks", "_compressed", "_compressor", "_folded_blocks", "_folded_size", "_size", "overflowed")

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._size = 0
        self._folded_blocks = 0
        self._folded_size = 0
        self._compressor: zlib._Compress | None = None
        self._compressed: list[bytes] = []
        self.overflowed = False

    def add(self, block: bytes) -> None:
        self._blocks.append(block)
        self._size += len(block)
        if self._size > FOLD:
            self._fold()

    @property
    def count(self) -> int:
        """How many times events were added."""
        return self._folded_blocks + len(self._blocks)

    @property
    def size(self) -> int:
        """Bytes added."""
        return self._folded_size + self._size

    def _fold(self) -> None:
        self._folded_size += self._size
        self._folded_blocks += len(self._blocks)
        if self._folded_size > LIMIT:
            self.overflowed = True
            self._compressed.clear()
        else:
            self._compressor = self._compressor or zlib.compressobj(1)
            self._compressed.append(self._compressor.compress(b"".join(self._blocks)))
        self._blocks.clear()
        self._size = 0

    def all(self) -> bytes:
        """Everything added. Only valid while not `overflowed`."""
        if self._compressor is None:
            return b"".join(self._blocks)
        folded = b"".join(self._compressed) + self._compressor.copy().flush()
        return zlib.decompress(folded) + b"".join(self._blocks)
