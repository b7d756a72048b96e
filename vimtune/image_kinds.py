"""What kinds of images there are: data sets and published weights state theirs, so that they can be compared.

Features of drawings say little about photographs, so weights that have seen nothing else are a poor start
there.
"""

from __future__ import annotations

from typing import Literal

ImageKind = Literal["photographs", "generated drawings"]
"""Photographs, or what the embedded generator of flowers makes."""
