"""`synthetic_flowers`: an embedded, deterministic field guide of flowers that do not exist.

Every image is a pure function of (seed, species, split, index, size); nothing is stored or downloaded.
`species` says what tells species apart, `painting` draws shapes and flowers, `scene` composes an image, and
`dataset` is the data set.
"""

from vimtune.data.synthetic.dataset import SyntheticFlowers

__all__ = ["SyntheticFlowers"]
