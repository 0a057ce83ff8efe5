"""The strategies that come with the router, one file each, of at most 60 lines.

Owns ``BUILT_IN``, which a new one is added to (docs/structure.md has the recipe). They import
:mod:`..authoring`, each other, and nothing else of MicroServe: each is an example of what an operator can
write. Start at data_parallel.py, then disaggregated.py; docs/strategies.md explains them in that order.
"""

from __future__ import annotations

from microserve.services.router.strategies.auto import auto
from microserve.services.router.strategies.balanced import balanced
from microserve.services.router.strategies.balanced_adaptive import balanced_adaptive
from microserve.services.router.strategies.cache_aware import cache_aware
from microserve.services.router.strategies.conditional import conditional
from microserve.services.router.strategies.data_parallel import data_parallel
from microserve.services.router.strategies.disaggregated import disaggregated
from microserve.services.router.strategies.elastic_roles import elastic_roles
from microserve.services.router.strategies.hedged import hedged
from microserve.services.router.strategies.kv_cost import kv_cost
from microserve.services.router.strategies.migrate import migrate
from microserve.services.router.strategies.min_ttft import min_ttft
from microserve.services.router.strategies.priority import priority
from microserve.services.router.strategies.replicate_hot import replicate_hot
from microserve.services.router.strategies.sticky import sticky
from microserve.services.router.strategies.tenant_share import tenant_share
from microserve.services.router.strategies.thirds import thirds
from microserve.services.router.strategies.token_aware import token_aware

BUILT_IN = (
    auto,
    balanced,
    balanced_adaptive,
    cache_aware,
    conditional,
    data_parallel,
    disaggregated,
    elastic_roles,
    hedged,
    kv_cost,
    migrate,
    min_ttft,
    priority,
    replicate_hot,
    sticky,
    tenant_share,
    thirds,
    token_aware,
)
