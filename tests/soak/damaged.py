"""Damaged files, a hundred of each seed."""

from collections import Counter

from damage import LIMIT, SECONDS
from damage import run as open_damaged

COUNT, EACH = 1000, 100


def run(soak):
    """The row of this part. Its seeds are none of those in `make test`."""
    counts = Counter()
    for number in range(soak.count or COUNT // EACH):
        if soak.over():
            return None
        seed = 1000 + 100 * soak.seed + number
        found, findings = open_damaged(EACH, seed, soak.kept)
        for kind, said, name, path in findings:
            soak.find(
                f"a damaged {name}: {kind}: {said}", f"damage.run({EACH}, {seed}), kept: {path}"
            )
        counts += found
        soak.progress(sum(counts.values()), EACH * (soak.count or COUNT // EACH), dict(counts))
    limits = {"limit_s": SECONDS, "limit_mib": LIMIT >> 20}
    total = sum(counts.values())
    bad = total - counts["works"] - counts["typed"]
    return [{"what": "all", "count": total, **counts, "findings": bad, **limits}]
