"""Pages: results with pictures, each as one HTML file that needs nothing else.

| file | what |
|---|---|
| `section.py` | what a page is made of: sections of sentences, tables, pictures and photographs |
| `page.py` | how these become HTML |
| `style.py` | the look of pictures |

`vimtune analyze`, `vimtune evaluate` and training runs write such pages. What a section says is the business
of whoever makes it.
"""
