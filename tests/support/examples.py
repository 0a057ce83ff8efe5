"""How many examples hypothesis makes of a test: all that it asks for in ``make test``, fewer in ``-m quick``.

The floor of every change is run so often that its parts add up; whoever wants all of them runs a test by its
name. ``@example`` counts in both.
"""

from __future__ import annotations

import hypothesis

QUICK_PROFILE = "quick"
"""The profile of a run of ``-m quick`` (tests/conftest.py)."""


def examples_in_quick(full: int) -> int:
    """A fifth of them, and some at least."""
    return min(full, max(12, full // 5))


def examples(full: int) -> int:
    """``full``, or less of them in a run of ``-m quick``: for ``settings(max_examples=...)``."""
    is_quick = hypothesis.settings.get_current_profile_name() == QUICK_PROFILE
    return examples_in_quick(full) if is_quick else full
