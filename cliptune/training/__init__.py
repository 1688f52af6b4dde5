"""One step and what surrounds it: loss, GradCache, optimiser, checkpoints of a run, what is told of it."""
