"""Decoded images that lie on the device as bytes, and batches that are made there (`--cache device`).

Nothing of an epoch but indices of images leaves the host, and the host never waits for the device while
batches are made.
"""
