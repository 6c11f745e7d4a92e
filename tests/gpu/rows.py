"""How many rows of two runs differ."""


def changed(found, wanted, what):
    """Rows whose tokens differ, printed; those that are alike must have the same sums."""
    assert len(found) == len(wanted)
    unlike = [place for place, (one, other) in enumerate(zip(found, wanted, strict=True)) if one.tokens != other.tokens]
    print(f"{what}: {len(unlike)} of {len(wanted)} rows differ")
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if place not in unlike:
            sums = (one.logp - other.logp, one.logp_base - other.logp_base, one.kl - other.kl)
            assert max(map(abs, sums)) < 1e-3 * max(1, len(one.tokens)), f"row {place}: {sums}"
    return len(unlike)
