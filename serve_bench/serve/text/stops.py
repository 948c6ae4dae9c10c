"""Stop strings in a text that comes in pieces."""

from __future__ import annotations


class StopStrings:
    """Finds the first stop string, wherever the pieces are cut."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.met = False
        self._stops = stops
        self._held = ""  # the end of the text, while it may be the beginning of a stop string

    def add(self, text: str) -> str:
        """The text that may go out now: no part of a stop string, and nothing after one."""
        if self.met:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.met, self._held = True, ""
            return text[: min(starts)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
