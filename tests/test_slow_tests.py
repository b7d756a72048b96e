"""Tests that take minutes have the time that they need where the machine has other work, too."""

from __future__ import annotations

import pytest


def test_slow_tests_have_a_limit_of_their_own(request):
    (conftest,) = (
        plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "SLOW_TIMEOUT")
    )

    def limit_of(*marks):
        item = pytest.Function.from_parent(request.node.parent, name="test_it", callobj=lambda: None)
        for mark in marks:
            item.add_marker(mark)
        conftest.pytest_collection_modifyitems([item])
        found = item.get_closest_marker("timeout")
        return None if found is None else found.args

    assert limit_of(pytest.mark.slow) == (conftest.SLOW_TIMEOUT,)
    assert 6 * float(request.config.getini("timeout")) <= conftest.SLOW_TIMEOUT
    assert limit_of(pytest.mark.slow, pytest.mark.timeout(5)) == (5,)
    assert limit_of(pytest.mark.gpu) is None
