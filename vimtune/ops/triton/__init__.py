"""GPU kernels in Triton; see `backend.py`."""
