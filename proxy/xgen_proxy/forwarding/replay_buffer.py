"""What a stream's client has been shown, kept so that the stream can go on elsewhere if it breaks."""

from __future__ import annotations

import zlib

FOLD = 64 * 1024  # most answers end before; chunks repeat themselves so much that what is folded takes a fifteenth
MOST = 16 * 1024 * 1024  # bytes of events, some 60,000 tokens: a longer answer is not continued


class ReplayBuffer:
    """Events as they were sent, in order. add() is called for every chunk and does next to nothing; all() is called
    when something broke. `over`: there was more than is kept."""

    __slots__ = ("_blocks", "_folded", "_folder", "_folds", "_size", "over", "total")

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._size = 0
        self._folds = 0  # blocks in what is folded, or dropped
        self._folder: zlib._Compress | None = None
        self._folded: list[bytes] = []
        self.total = 0
        self.over = False

    def add(self, block: bytes) -> None:
        self._blocks.append(block)
        self._size += len(block)
        if self._size > FOLD:
            self._fold()

    @property
    def count(self) -> int:
        """Of the blocks that were added."""
        return self._folds + len(self._blocks)

    @property
    def size(self) -> int:
        """Of all that was added, in bytes."""
        return self.total + self._size

    def _fold(self) -> None:
        self.total += self._size
        self._folds += len(self._blocks)
        if self.total > MOST:
            self.over = True
            self._folded.clear()
        else:
            self._folder = self._folder or zlib.compressobj(1)
            self._folded.append(self._folder.compress(b"".join(self._blocks)))
        self._blocks.clear()
        self._size = 0

    def all(self) -> bytes:
        if self._folder is None:
            return b"".join(self._blocks)
        folded = b"".join(self._folded) + self._folder.copy().flush()
        return zlib.decompress(folded) + b"".join(self._blocks)
