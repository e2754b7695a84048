"""Files that are read at a position, whatever their bytes come from."""

from __future__ import annotations

import io


class SizedFile(io.RawIOBase):
    """`size` bytes, to be read and sought. What is below it reads at `position`, and moves it on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Also past the end. Raises OSError for a position before the start."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(22, "Invalid argument")
        self.position = position
        return position
