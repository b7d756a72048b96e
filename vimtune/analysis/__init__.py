"""`vimtune analyze`: what training has done to a model, in one report with pictures and numbers.

| file | what |
|---|---|
| `registry.py` | the analyses by name; it needs no torch |
| `components.py`, `transformation.py`, `gradient.py` | analyses of weights and their gradients |
| `similarity.py`, `scan_maps.py`, `cost.py` | analyses of features, scans and operations |
| `subject.py` | what an analysis is given: the model before and after training, and data |
| `scan_matrix.py`, `scan_drawing.py` | what a scan reads from where: the formula and the pictures |
| `parameters.py`, `diagonal.py`, `drawing.py` | what several analyses compute and draw |
| `report.py`, `command.py` | the report as a page (`vimtune.pages`) and as JSON, and the command |

An analysis is a module here with a function `analyze(subject)`, which gives a section of the page, and a line
in the table of `registry.py`. The functions behind it take tensors or models and serve without a run.
"""
