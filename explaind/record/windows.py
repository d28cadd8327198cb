"""Which steps of a training are recorded."""

from collections.abc import Sequence

from explaind.errors import RecordError


class Windows:
    """Counts the steps of a training, of which those in [start, stop) of any window are recorded."""

    def __init__(self, spans: Sequence[tuple[int, int]] | None, optimizers: int, number: int = 0) -> None:
        """spans: ascending; None: every step. number: of the step to come."""
        self.number, self.passed = number, 0
        self.all = spans is None
        """Whether there are none: every step is recorded."""
        self._spans, self._optimizers = _checked(spans), optimizers
        self._stepped = set[int]()

    @property
    def recorded(self) -> bool:
        """Whether the step at hand is."""
        return self._spans is None or any(start <= self.number < stop for start, stop in self._spans)

    @property
    def to_come(self) -> int | None:
        """How many steps of the windows are yet to be made; None where all steps are recorded."""
        return None if self._spans is None else sum(max(0, stop - max(start, self.number)) for start, stop in self._spans)

    def taken(self) -> None:
        """The step at hand was recorded."""
        self.number, self.passed = self.number + 1, 0

    def stepped(self, optimizer: int) -> None:
        """An optimizer made a step that is not recorded."""
        if optimizer in self._stepped:
            self.end()
        self._stepped.add(optimizer)
        if len(self._stepped) == self._optimizers:
            self.end()

    def end(self) -> None:
        """The step at hand, where any optimizer made one, is over."""
        if self._stepped:
            self.number, self.passed, self._stepped = self.number + 1, self.passed + 1, set()


def _checked(spans: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...] | None:
    if spans is None:
        return None
    found = tuple((int(start), int(stop)) for start, stop in spans)
    edges = [edge for span in found for edge in span]
    if not edges or edges[0] < 0 or any(b <= a for a, b in found) or sorted(edges) != edges:
        raise RecordError(
            "these are no windows of steps",
            expected="ascending pairs (start, stop) with 0 ≤ start < stop",
            got=list(spans),
            do="give for instance steps=[(0, 100), (1000, 1100)]",
        )
    return found
