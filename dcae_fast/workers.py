"""The number of data-reading processes."""

import os


def default_workers() -> int:
    """The default number of data-reading processes of this rank: its share of the machine's CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
