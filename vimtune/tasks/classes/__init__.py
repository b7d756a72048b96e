"""What tasks have in common whose answers are classes: images, and texts with labels.

| file | what |
|---|---|
| `answers.py` | what a classifier has said of every example, and what follows from it |
| `confusion.py` | the confusion matrix as a table and as a picture |
| `calibration.py` | whether the probabilities are to be believed, also those of single labels |
| `reliability.py` | the same as a section of a page, with its picture |
| `details.py` | what an evaluation says: classes, confusions, calibration, mistakes |
| `page.py` | the same as a page |
"""
