"""One thing looked at: well, worth knowing, or a problem, with the reason and the cure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]

MARKS = {"ok": "ok ", "note": "-  ", "problem": "BAD"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do.

    `state` is `ok`, `note` (something slower runs instead, or is not there and not needed) or `problem`.
    """

    subject: str
    state: str
    text: str
    cure: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether the machine is not healthy because of it."""
        return self.state == "problem"

    def lines(self, width: int) -> list[str]:
        """For people, the subject filled up to `width`."""
        found = [f"  {MARKS[self.state]} {self.subject.ljust(width)}  {self.text}"]
        return found + ([f"      {' ' * width}  -> {self.cure}"] if self.cure else [])
