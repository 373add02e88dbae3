"""CPU time and memory of a process and everything it started."""

import psutil  # type: ignore[import-untyped]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all its descendants, those that ended included."""
    root = psutil.Process(pid)
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        # The last two: of children that have ended, which autovacuum workers soon do.
        total += times.user + times.system + times.children_user + times.children_system
    return total


def machine_cpu_seconds() -> float:
    """What all programs of the machine have used so far, those of others included."""
    times = psutil.cpu_times()
    # Time given to virtual machines is in `user` already.
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def resident_bytes(pid: int) -> int:
    """The resident memory of one process."""
    return int(psutil.Process(pid).memory_info().rss)
