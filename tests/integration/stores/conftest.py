"""Helpers of the adapters' own tests."""

import pytest

pytest.register_assert_rewrite("tests.integration.stores.contract")
