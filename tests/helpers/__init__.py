"""What several packages' tests need besides fixtures, which are in conftest.py. No test file imports from another."""

import pytest

pytest.register_assert_rewrite("helpers.cli", "helpers.runs")  # so that their assertions tell what they found
