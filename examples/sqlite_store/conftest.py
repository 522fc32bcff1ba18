"""Failed asserts of the contract show their values."""

import pytest

pytest.register_assert_rewrite("migrator.adapters.testing")
