"""Many clients at the same time; `make soak` runs longer, with more."""

from __future__ import annotations

import pytest

from tests.gateway.soak import run_soak
from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine


def test_many_clients_of_all_apis_stream_at_the_same_time(gateway: GatewayProcess) -> None:
    result = run_soak(gateway, streams=80, minutes=0)
    assert result.is_good, str(result)
    assert result.answers == 160
