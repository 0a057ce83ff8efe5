"""A prompt's prefill elsewhere, and a second engine for all of it when that takes too long.

Shows a race whose first entrant is a generation with a grant: if the sender is slow, or dies, the other
engine serves, and what both have begun in vain is dropped.
"""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated,
    Chunks,
    Generating,
    Mesh,
    Meta,
    Request,
    strategy,
)


@strategy
async def hedged_prefill(
    mesh: Mesh, request: Request, *, after_s: Annotated[float, Meta(ge=0.0)] = 0.5
) -> Chunks:
    """Prefill and decode on two engines; a third, or the sender, after ``after_s`` more than predicted."""
    decode = mesh.pick("decode", request)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    if prefill == decode:
        yield decode.start_generate(request)
        return
    second = mesh.pick(None, request, exclude=[decode, prefill])
    if second == decode:
        second = prefill
    # The first token needs the prompt's last row, which the decode engine computes itself.
    end = request.num_tokens - 1
    grant = await decode.prep_recv(request, end=end)

    def split() -> Generating:
        prefill.remote_send(request, grant, end=end)
        return decode.start_generate(request, begin=end, grant=grant)

    wait_s = after_s + mesh.predicted_ttft_s(prefill, mesh.uncached(prefill, request))
    yield await mesh.race(request, split, second, after_s=wait_s)
