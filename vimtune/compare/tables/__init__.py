"""The tables of a comparison, and how they are shown.

| file | what |
|---|---|
| `contents.py` | which tables there are, and the texts of their columns and cells |
| `notes.py` | what is said beside them: how the runs were made, what a reader has to know |
| `markdown.py`, `latex.py`, `console.py` | the same tables as Markdown, as LaTeX, and printed |
| `csv.py` | tables of numbers for programs, unrounded |
| `files.py` | all of them and the pictures, written into a folder |
"""
