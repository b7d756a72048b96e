"""Metrics: formulas that turn answers of a model into numbers, as functions of tensors.

| file | what |
|---|---|
| `ranking.py` | average precision of each class |

A metric of another kind of answer is a file beside these.
"""
