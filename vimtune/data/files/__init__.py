"""Files of data sets: found, fetched, and read as input that may come from anybody."""
