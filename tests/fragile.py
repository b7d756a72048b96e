"""An object for a worker process that can fail in every way; alone in a module that imports quickly."""

from __future__ import annotations

import os
import time


class Fragile:
    def __init__(self, start: str = "fine") -> None:
        if start == "fails":
            raise ValueError("cannot start here")
        self.value = 0

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def fail(self) -> None:
        raise FloatingPointError("first line\nsecond line")

    def die(self) -> None:
        os._exit(1)

    def hang(self) -> None:
        time.sleep(60)
