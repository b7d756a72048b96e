"""`vimtune search`: which methods, at which places and sizes, score best on a validation split.

| file | what |
|---|---|
| `settings.py`, `space.py` | what may be drawn: ranges and choices, parts of a composition, keys |
| `reading.py`, `spaces/` | spaces in YAML: how one is read, and those that are published |
| `reading_settings.py` | how it is stated what may be drawn for one option or key |
| `contradictions.py` | what the parts of a space, and what may be drawn, demand of each other |
| `fitting.py` | whether the model can have the parts of a space |
| `composing.py` | from what was drawn to the recipe of a trial |
| `study.py` | which trials there were, and which one comes next (optuna, in a journal file) |
| `trial.py`, `workers.py` | one training run, and several of them at once |
| `earlier.py` | whether finished trials had the defaults of today |
| `plan.py`, `results.py`, `search.py` | what a search is, what it leaves behind, and how it goes |

Nothing that is imported here needs torch or optuna.
"""
