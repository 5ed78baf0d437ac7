"""How many examples property tests try: few and always the same in ``make test``, many and fresh on demand.

``DWINDLE_PROPERTY_EXAMPLES=2000 pytest tests/realize/test_random_graphs.py`` runs the thorough form.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

#: Number of examples asked for; 0 for the quick form.
EXAMPLES = int(os.environ.get("DWINDLE_PROPERTY_EXAMPLES", "0"))


def thoroughness(quick: int) -> settings:
    """Return settings with ``quick`` derandomized examples, or with as many random ones as the environment says."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    if EXAMPLES:
        return settings(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=checks)
    return settings(
        max_examples=quick, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )
