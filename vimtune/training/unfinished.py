"""What is known of a run that is not finished, from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vimtune.run_folder import RunFolder
from vimtune.training.identity import ResumeError, options_of
from vimtune.training.state import load_run_state


def options_begun_with(folder: RunFolder) -> Mapping[str, Any]:
    """Every option of each method, method -> option -> value, by the state of the run.

    A run without a state begins anew, and one of which the state is damaged says so itself: there are none
    then.
    """
    try:
        state = load_run_state(folder.checkpoint)
    except ResumeError:
        return {}
    return options_of(state.recipe, state.facts)
