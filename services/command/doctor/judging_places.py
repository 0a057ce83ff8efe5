"""What is wrong about an address that does not lead to its service, and how it is mended. Pure."""

from __future__ import annotations

from microserve.services.command.doctor.observation import Finding, Place, Reach


def unreached(place: Place, who: str, *, has_keys: bool) -> Finding | None:
    """An address that does not lead to its service; None: it does."""
    where = f"{who}, {place.what}, {place.address}"
    match place.reach:
        case Reach.REACHED:
            return None
        case Reach.REFUSED:
            mend = "is it running, and does it listen on that port? The address is the one that it announces"
            return Finding("port_closed", "nobody listens there", where, mend)
        case Reach.SILENT:
            mend = "open the way from here to there: routes, firewalls; does it announce the right address?"
            return Finding("unreachable", "nothing answers there", where, mend)
        case Reach.NO_ADDRESS:
            mend = "set an address that means the same on all hosts"
            return Finding("bad_address", place.detail or "that is no address here", where, mend)
    if not has_keys:
        mend = "set bus.curve_dir to this host's directory of keys: that service speaks CURVE only"
        return Finding("wrong_key", "it does not let us in, and we have no keys", where, mend)
    mend = (
        "our public key belongs into its trusted/, and its public key into our directory of keys; "
        "'microserve keys --mesh DIR' makes all of them"
    )
    return Finding("wrong_key", "it does not let us in with the keys that we have", where, mend)
