"""What tasks have in common whose answers are classes: images, and texts with labels.

| file | what |
|---|---|
| `answers.py` | what a classifier has said of every example, and what follows from it |
| `confusion.py` | the confusion matrix as a table and as a picture |
| `reliability.py` | the picture of the calibration |
| `details.py` | what an evaluation says: classes, confusions, calibration, mistakes |
| `page.py` | the same as a page |
"""
