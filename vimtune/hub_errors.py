"""The errors with which a request to the Hugging Face hub ends.

huggingface_hub passes on those of the library that makes its requests, such as a connection that is refused.
That library is another one in other versions, and its errors need not be those of the system. What all of its
errors derive from is known by the error that huggingface_hub derives from it.
"""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    HFValidationError,
    LocalEntryNotFoundError,
    OSError,
)
"""No network or no such repository, a refusal, or a name that is none."""
