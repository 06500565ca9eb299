"""What turns hidden rows into logits: the head, its product in the dtypes asked for, and the row kernels that go with it."""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from tspin_kernels import _rows_torch
from tspin_kernels._inputs import LogitTransform
from tspin_kernels._plan import Sizes
from tspin_kernels._shards import Shard

_NARROW = (torch.float16, torch.bfloat16)
# Columns of 16-bit logits in 16 bytes, from where a GPU's matrix units start: at other widths products take several times as long.
_COLUMNS = 8


def rows_module(backend: str, device: torch.device) -> ModuleType:
    """The module of row kernels that a backend's name stands for on a device. A named backend never falls back."""
    if backend == "torch":
        return _rows_torch
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend: want 'auto', 'triton', 'torch' or 'reference', got {backend!r}")
    if backend == "auto" and device.type == "cpu":
        return _rows_torch
    try:
        from triton import knobs
    except ImportError:
        if backend == "auto":
            return _rows_torch
        raise ValueError(
            "backend: 'triton' is not installed here; pip install triton (Linux), or use backend='torch'"
        ) from None
    if device.type == "cpu" and not knobs.runtime.interpret:
        raise ValueError(
            "backend: 'triton' wants tensors on a GPU, got cpu; move them, use backend='torch', "
            "or set TRITON_INTERPRET=1 before the import"
        )
    from tspin_kernels import _rows_triton

    return _rows_triton


@dataclass(frozen=True)
class Head:
    """All that turns hidden rows into logits."""

    weight: Tensor  # [V, D], or of `padded` rows, the last of them zeros
    bias: Tensor | None  # [V]
    transform: LogitTransform
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    rows: ModuleType
    shard: Shard | None = None  # where the weight holds only some of the vocabulary
    size: int | None = None  # V, where the weight has more rows

    @property
    def V(self) -> int:
        return self.weight.shape[0] if self.size is None else self.size

    @property
    def start(self) -> int:
        """The token id of the weight's first row."""
        return 0 if self.shard is None else self.shard.start

    @property
    def widest(self) -> int:
        """V, or the most that a rank has, padded: what plans are made for, so that all ranks make the same."""
        return self.padded(self.V if self.shard is None else self.shard.widest)

    def padded(self, columns: int) -> int:
        """The width in memory of a block of so many columns."""
        return padded_columns(columns, self.compute_dtype)

    def columns(self, start: int, stop: int) -> "Head":
        """These columns alone, their weight padded and in the dtype of the products."""
        size, width = stop - start, self.padded(stop - start)
        if self.size == size:
            return self
        weight = self.weight[start:stop].to(self.compute_dtype)
        if width > size:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, width - size))
        return replace(self, weight=weight, bias=None if self.bias is None else self.bias[start:stop], size=size)

    def sizes(
        self,
        N: int,
        hidden: Tensor,
        dhidden: torch.dtype | None,
        dweight: torch.dtype | None,
        *,
        gathered: bool,
        scattered: bool,
    ) -> Sizes:
        """What the planner asks of N rows of `hidden` and the dtypes of the gradients; rows `gathered` by an index, those of their
        gradient `Scattered`."""
        D, narrow = self.weight.shape[1], self.compute_dtype in _NARROW
        on_cpu = hidden.device.type == "cpu"

        def how(dtype: torch.dtype | None) -> str | None:
            return None if dtype is None else "narrow" if dtype in _NARROW else "wide" if narrow else "direct"

        # The CPU has no product of narrow operands with a wide result: it widens them first.
        wide_copy = 4 if on_cpu and narrow else 0
        copied = self.compute_dtype.itemsize
        is_copied = self.weight.dtype != self.compute_dtype or self.padded(self.V) != self.V
        # Wide logits have their gradient beside them, in the dtype of the products.
        dlogits = copied if self.logits_dtype != self.compute_dtype and (dhidden or dweight) else 0
        return Sizes(
            N,
            self.widest,
            D,
            self.logits_dtype.itemsize + dlogits + wide_copy,
            how(dhidden),
            how(dweight),
            always_sum=self.compute_dtype == torch.float16,
            row_bytes=D * (wide_copy + (copied if gathered or hidden.dtype != self.compute_dtype else 0)),
            col_bytes=D * (wide_copy + (copied if is_copied else 0)),
            scattered=dhidden.itemsize if scattered and dhidden else 0,
        )

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """out [N, V], padded, = hidden [N, D] times the transpose of the weight, which is in the dtype of the products."""
        product(hidden.to(self.compute_dtype), self.weight.T, out.dtype, out)


def padded_columns(columns: int, dtype: torch.dtype) -> int:
    """How wide `columns` of logits are in memory, for products in `dtype`."""
    return -(-columns // _COLUMNS) * _COLUMNS if dtype in _NARROW else columns


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in their own dtype, or in float32 as it is accumulated."""
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)
