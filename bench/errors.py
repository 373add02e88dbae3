"""When a run is worth nothing."""


class BenchmarkVoid(Exception):
    """The run does not show what it claims to: a setting is off, or data is missing."""
