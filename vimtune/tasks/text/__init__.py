"""The work of language tasks: tokens, batches, scores, and what a run is opened with."""
