"""Metrics: formulas that turn answers of a model into numbers, as functions of tensors.

| file | what |
|---|---|
| `classes.py` | precision, recall and F1 of each class, macro and micro F1, the most confused pairs |
| `calibration.py` | whether probabilities are to be believed: reliability, calibration error, temperature |
| `ranking.py` | average precision of each class |

Which of them a task reports is said by its details (`vimtune.tasks.details`). A metric of another kind of
answer is a file beside these.
"""
