"""The strategies that come with the router, one file each, of at most 60 lines.

Owns ``BUILT_IN``, which a new one is added to (docs/structure.md has the recipe), and three rooms: one engine
for a request (placing/), two or more (splitting/), KV that moves (moving/). They import :mod:`..authoring`,
each other, and nothing else of MicroServe: each is an example of what an operator can write. Start at
placing/data_parallel.py, then splitting/disaggregated.py; docs/strategies.md explains them in that order.
"""

from __future__ import annotations

from microserve.services.router.strategies.auto import auto
from microserve.services.router.strategies.moving.migrate import migrate
from microserve.services.router.strategies.moving.min_ttft import min_ttft
from microserve.services.router.strategies.moving.replicate_hot import replicate_hot
from microserve.services.router.strategies.placing.data_parallel import data_parallel
from microserve.services.router.strategies.placing.hedged import hedged
from microserve.services.router.strategies.placing.kv_cost import kv_cost
from microserve.services.router.strategies.placing.priority import priority
from microserve.services.router.strategies.placing.sticky import sticky
from microserve.services.router.strategies.placing.tenant_share import tenant_share
from microserve.services.router.strategies.placing.token_aware import token_aware
from microserve.services.router.strategies.splitting.balanced import balanced
from microserve.services.router.strategies.splitting.balanced_adaptive import balanced_adaptive
from microserve.services.router.strategies.splitting.cache_aware import cache_aware
from microserve.services.router.strategies.splitting.conditional import conditional
from microserve.services.router.strategies.splitting.disaggregated import disaggregated
from microserve.services.router.strategies.splitting.elastic_roles import elastic_roles
from microserve.services.router.strategies.splitting.prfaas import prfaas
from microserve.services.router.strategies.splitting.thirds import thirds

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
    prfaas,
    priority,
    replicate_hot,
    sticky,
    tenant_share,
    thirds,
    token_aware,
)
