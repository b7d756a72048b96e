"""From a data set to batches: which image is read when, by how many processes, and where it is kept."""
