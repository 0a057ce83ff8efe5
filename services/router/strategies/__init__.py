"""The strategies that come with the router, one file each."""

from __future__ import annotations

from microserve.services.router.strategies.auto import auto
from microserve.services.router.strategies.balanced import balanced
from microserve.services.router.strategies.cache_aware import cache_aware
from microserve.services.router.strategies.data_parallel import data_parallel
from microserve.services.router.strategies.disaggregated import disaggregated
from microserve.services.router.strategies.migrate import migrate

BUILT_IN = (auto, balanced, cache_aware, data_parallel, disaggregated, migrate)
