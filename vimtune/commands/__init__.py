"""What the commands do with trained adapters, as functions of Python that print what is found.

The flags of a command are in `vimtune.cli`, in the file of the same name. `analyze`, `compare`, `search` and
what has to do with the hub are larger, and have packages of their own.
"""
