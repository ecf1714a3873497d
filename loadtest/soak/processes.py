"""The service's processes: what they use, and faults for some of them."""

import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil

ENGINE, INGRESS = "EngineReplica", "Ingress"
OTHERS = {"haproxy": "haproxy", "raylet": "raylet", "gcs_server": "gcs_server", "ServeController": "ServeController"}


@dataclass(slots=True)
class Use:
    """What one process used, over time."""

    kind: str
    seconds: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slope_mib_per_hour(self) -> float:
        """Of resident memory, by least squares over the second half of its life; 0 with too little to tell."""
        half = len(self.seconds) // 2
        seconds, sizes = self.seconds[half:], self.rss_mib[half:]
        if len(seconds) < 3:
            return 0.0
        mean_s, mean = sum(seconds) / len(seconds), sum(sizes) / len(sizes)
        spread = sum((s - mean_s) ** 2 for s in seconds)
        return 3600 * sum((s - mean_s) * (size - mean) for s, size in zip(seconds, sizes, strict=True)) / spread


class Processes:
    """All that descends from one process.

    Args:
        pid: of `make serve`.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._start = time.monotonic()
        self.uses: dict[int, Use] = {}

    def by_kind(self) -> dict[str, list[psutil.Process]]:
        """Those that are of interest."""
        found: dict[str, list[psutil.Process]] = defaultdict(list)
        for process in self._root.children(recursive=True):
            try:
                title = process.cmdline()[0]
            except (psutil.Error, IndexError):
                continue  # it has ended, or is about to
            for mark, kind in ({f":{kind}": kind for kind in (ENGINE, INGRESS)} | OTHERS).items():
                if mark in title:
                    found[kind].append(process)
        return found

    def measure(self) -> None:
        """Note what each uses now."""
        for kind, processes in self.by_kind().items():
            for process in processes:
                try:
                    size, files = process.memory_info().rss / 2**20, process.num_fds()
                except psutil.Error:
                    continue
                use = self.uses.setdefault(process.pid, Use(kind))
                use.seconds.append(time.monotonic() - self._start)
                use.rss_mib.append(size)
                use.files.append(files)

    def kill_replica(self) -> str:
        """SIGKILL the oldest engine replica."""
        return self._signal(signal.SIGKILL, "killed")

    def stop_replica(self) -> str:
        """SIGSTOP the oldest engine replica."""
        return self._signal(signal.SIGSTOP, "stopped, without a word")

    def _signal(self, number: signal.Signals, what: str) -> str:
        replicas = self.by_kind()[ENGINE]
        if len(replicas) < 2:
            return "no fault: one replica is left"
        oldest = min(replicas, key=psutil.Process.create_time)
        oldest.send_signal(number)
        return f"engine replica {oldest.pid} {what}"
