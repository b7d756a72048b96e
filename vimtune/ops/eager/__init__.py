"""Operations in plain PyTorch; see `backend.py`."""
