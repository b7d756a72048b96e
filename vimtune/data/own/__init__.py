"""A user's own images: in folders, in tables of labels, and as the library `datasets` has them."""
