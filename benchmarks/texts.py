"""How far texts agree: counted up to the first token that differs, behind which two texts have nothing in common."""


def common_share(texts: list[list[int]], plain: list[list[int]]) -> float:
    """Share of the tokens of `plain` up to which each text equals its counterpart: 1.0 when all are equal."""
    common = 0
    for mine, other in zip(texts, plain, strict=True):
        pairs = zip(mine, other, strict=False)
        common += next((nth for nth, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
    return common / sum(map(len, plain))
