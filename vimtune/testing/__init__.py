"""Checks for those who add to vimtune. They need no pytest; a failure is an AssertionError that names the
check.

    from vimtune.testing import check_method

    def test_my_method():
        check_method("my_method", rank=3)

The tests of vimtune itself run the same checks on all that it has registered.
"""

from vimtune.testing.methods import METHOD_CHECKS, MethodCase, check_method

__all__ = ["METHOD_CHECKS", "MethodCase", "check_method"]
