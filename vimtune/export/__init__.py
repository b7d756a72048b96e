"""Models in formats of other programs: ONNX for onnxruntime and its like, torch.export's `.pt2`.

`formats.py` says what a format is and lists those that there are; each has a file here. A model becomes a
graph of torch's own operations in `graph.py`, with the scan in the form that the format asks for
(`scans.py`). Which model that is, and what is written beside it, belongs to the task (`Task.export`).
"""
