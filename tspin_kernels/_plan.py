"""How a call fits its byte budget: which logits exist at once. A pure function of sizes, so that plan and bits never depend
on the state of an allocator.

Plans: `store` keeps the logits of the whole call from forward to backward (6NVD flops); `recompute` makes them again, block
by block (8NVD); without a gradient there is only the projection (2NVD). With several blocks on both axes one float32
accumulator of 4 D min(N, V) bytes is unavoidable when the gradient itself is of a narrower dtype: it counts.
"""

from dataclasses import dataclass
from functools import lru_cache

DEFAULT_BUDGET = 2 * 2**30
_MIN_ROWS, _MIN_COLS = 16, 64


@dataclass(frozen=True)
class Sizes:
    """What a plan is made from.

    `dhidden` and `dweight` say how a gradient is summed over blocks: "direct" into its result, "wide" into its float32 result
    from narrow products (one product's worth of float32 beside it), "narrow" by a float32 accumulator, None: not wanted.
    `always_sum`: the accumulator is needed even for a single block (float16, which is rescaled on the way). `scattered`: bytes of
    an element of dhidden where its rows go to other places as they are done, so that blocks cannot be summed there.
    """

    N: int
    V: int
    D: int
    logit_bytes: int
    dhidden: str | None = None
    dweight: str | None = None
    always_sum: bool = False
    row_bytes: int = 0  # copies of operands that a block makes, per token
    col_bytes: int = 0  # and per vocabulary column
    scattered: int = 0

    def total(self, rows: int, cols: int) -> int:
        """Bytes of one block of logits and of all that its products and sums need."""
        return (
            rows * cols * self.logit_bytes
            + rows * self.row_bytes
            + cols * self.col_bytes
            + self.hidden_bytes(rows, cols)
            + self._sum_bytes(self.dweight, cols, self.V if self.N > self.V else cols, several=rows < self.N)
        )

    def hidden_bytes(self, rows: int, cols: int) -> int:
        """Of them, those of the sums of dhidden."""
        several = cols < self.V
        # The longer axis is the outer loop, so that only the shorter axis' gradient is held whole.
        summed = self.N if several and self.N <= self.V else rows
        return self._sum_bytes(self.dhidden, rows, summed, several, self.scattered)

    def _sum_bytes(self, how: str | None, product: int, summed: int, several: bool, scattered: int = 0) -> int:
        if how == "narrow" and (several or self.always_sum):
            return 4 * self.D * (product + summed)
        return self.D * ((4 * product if how == "wide" else 0) + (scattered * summed if how else 0))


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a block of logits; `tokens_inner`: the loop over tokens is the inner one."""

    rows: int
    cols: int
    tokens_inner: bool = True


@lru_cache(maxsize=1024)
def plan_blocks(sizes: Sizes, budget: int) -> Blocks:
    """The blocks within `budget` bytes that move the fewest partial sums. Raises ValueError naming the smallest budget."""
    N, V = max(1, sizes.N), sizes.V
    best: tuple[int, int, int] | None = None
    parts = 1
    while True:
        rows = max(min(N, _MIN_ROWS), -(-N // parts))
        cols = _widest(sizes, rows, budget)
        if cols:
            traffic = N * (-(-V // cols) - 1) + V * (-(-N // rows) - 1)
            if best is None or traffic < best[0]:
                best = (traffic, rows, cols)
        if rows <= _MIN_ROWS:
            break
        parts += max(1, parts // 4)
    if best is None:
        few_rows, few_cols = min(N, _MIN_ROWS), min(V, _MIN_COLS)
        least = min(sizes.total(rows, cols) for rows in (few_rows, N) for cols in (few_cols, V))
        raise ValueError(
            f"memory_budget: want at least {least} bytes for {N} tokens, V={V}, D={sizes.D}, got {budget}; "
            "raise it or pass fewer tokens"
        )
    return Blocks(best[1], best[2], tokens_inner=sizes.N <= V)


def _widest(sizes: Sizes, rows: int, budget: int) -> int:
    # The most columns that fit beside `rows` rows, 0 where not even the narrowest block does.
    if sizes.total(rows, sizes.V) <= budget:
        return sizes.V
    low, high = 0, -(-sizes.V // _MIN_COLS) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sizes.total(rows, middle * _MIN_COLS) <= budget else (low, middle - 1)
    return low * _MIN_COLS
