"""Plan and survey to an estimate: steps, time, disk and memory, and its words. No torch."""
