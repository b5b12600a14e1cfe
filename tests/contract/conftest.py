"""The contract suites live in the library; pytest explains their failed asserts only if told to beforehand."""

import pytest

pytest.register_assert_rewrite("sync_engine.testing.contract")
