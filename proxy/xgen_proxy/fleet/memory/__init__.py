"""The memory guard: a replica that runs short of memory takes less work, then none."""
