"""A library as a table: what each profile brings, loses and costs."""

from __future__ import annotations

from microserve.kvcache.codec.library import Library, Measured

MEBIBYTE = 1 << 20
HEAD = ("ratio", "score", "95 %", "KL", "same", "attention", "encode", "decode")


def table(library: Library) -> list[str]:
    """Lines; times are of one MiB of raw KV in one payload."""
    rows = [("profile", *HEAD), *(_row(entry) for entry in library.entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _row(entry: Measured) -> tuple[str, ...]:
    quality = entry.quality
    interval = f"{quality.score_low:.3f}-{quality.score_high:.3f}" if entry.profile.is_lossy else "exact"
    return (
        entry.profile.name,
        f"{entry.ratio:.2f}",
        f"{quality.score:.3f}",
        interval,
        f"{quality.logit_kl:.4f}",
        f"{quality.greedy_agreement:.3f}",
        f"{quality.attention_error:.3f}",
        f"{entry.encode.seconds(MEBIBYTE) * 1e3:.1f} ms",
        f"{entry.decode.seconds(MEBIBYTE) * 1e3:.1f} ms",
    )
