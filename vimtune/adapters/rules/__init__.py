"""The formulas of the methods whose options are in `vimtune.methods`."""
