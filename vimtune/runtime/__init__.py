"""What a computation runs in: processes, devices, precision, seeds. Nothing here knows what is computed."""
