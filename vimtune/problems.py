"""An error with several reasons, all of which a user mends at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from vimtune.text import printable


class ProblemsError(ValueError):
    """What a user has written cannot be used; `problems` lists every reason, one line each."""

    subject: ClassVar[str] = "the input"
    """What has the problems."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [printable(problem) for problem in problems]
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems in {self.subject}:\n" + "\n".join(
                f"  - {problem}" for problem in self.problems
            )
        super().__init__(message)
