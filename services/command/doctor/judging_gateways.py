"""What is wrong about gateways, by what they and their routers say. Pure, as judging.py."""

from __future__ import annotations

from collections.abc import Iterator

from microserve.services.command.doctor.judging_places import unreached
from microserve.services.command.doctor.observation import Finding, GatewaySeen, Observation


def of_gateways(seen: Observation) -> Iterator[Finding]:
    for gateway in seen.gateways:
        yield from _of_gateway(gateway, has_keys=seen.has_keys)


def _of_gateway(gateway: GatewaySeen, *, has_keys: bool) -> Iterator[Finding]:
    where = f"gateway, {gateway.url}"
    if (finding := unreached(gateway.place, "gateway", has_keys=has_keys)) is not None:
        yield finding
    elif gateway.error:
        mend = "is that a gateway, and does gateway.tls_cert here name its certificate? Its log says more"
        yield Finding("gateway_silent", gateway.error, where, mend)
    elif gateway.unready:
        mend = (
            "gateway.routers names the routers; they need engines of the gateway's model (model.name), and "
            "the gateway the keys of its role"
        )
        yield Finding("gateway_not_ready", gateway.unready, where, mend)
