"""When kernels and collectives run: kernels one after the other, collectives next to them."""

from collections import defaultdict


class Timeline:
    """The streams of a GPU: one of kernels, and one of collectives for each process group.

    A collective begins once its group's stream is free and the kernels before it are done. Kernels
    wait for a collective where the code waits for it. That both then slow each other down is not
    modelled.

    Attributes:
        now: Seconds at which the last kernel ends.
        busy: Seconds of collectives, by purpose.
        exposed: Seconds that kernels waited for collectives, by purpose.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.exposed: defaultdict[str, float] = defaultdict(float)
        self._free: defaultdict[str, float] = defaultdict(float)

    def compute(self, seconds: float) -> None:
        """Run a kernel."""
        self.now += seconds

    def start(self, purpose: str, seconds: float) -> float:
        """Start a collective.

        Args:
            purpose: Name of the process group.
            seconds: How long it takes.

        Returns:
            When it ends.
        """
        end = max(self.now, self._free[purpose]) + seconds
        self._free[purpose] = end
        self.busy[purpose] += seconds
        return end

    def wait(self, purpose: str, end: float) -> None:
        """Let the kernels that follow wait until `end`."""
        if end > self.now:
            self.exposed[purpose] += end - self.now
            self.now = end
