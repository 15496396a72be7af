"""Which part of a model one of several ranks holds: heads and the MLP's width are split, so that a layer's
first matrices need no word from other ranks and its last ones a sum over them (Megatron-LM,
arXiv:1909.08053); of the embedding and the head each rank has some tokens' rows.

Some ranks may hold a head more than others; where KV heads are fewer than ranks, several hold the same one,
and each as many of its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pagetide.models.config import DecoderConfig, UnsupportedModelError
from pagetide.ops.adapters import LayerAdapter, LowRank
from pagetide.ops.comm import Comm
from pagetide.ops.layers import Affine, Embedding, EmbeddingWeights, LayerWeights
from pagetide.ops.weights import Weight, columns_of, rearranged

# In which the MLP is split: the first that gives every rank as much. All kernels take whole 16s.
_WIDTHS = (128, 32, 16)
_NARROWEST = 16


@dataclass(frozen=True)
class Shard:
    """What one rank has of a model of this shape."""

    model: DecoderConfig
    rank: int
    size: int
    query_heads: range
    kv_heads: range
    intermediate: range
    vocabulary: range

    @property
    def config(self) -> DecoderConfig:
        """The model's, with this rank's heads and width."""
        return replace(
            self.model,
            num_heads=len(self.query_heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
        )

    def layer(self, whole: LayerWeights) -> LayerWeights:
        """This rank's part of a layer. Raises UnsupportedModelError where codes cannot be split."""
        if self.size == 1:
            return whole
        return replace(
            whole,
            qkv=_outputs(whole.qkv, self._heads),
            out=self._inputs(whole.out, self._queries),
            gate_up=_outputs(whole.gate_up, self._gate_up),
            down=self._inputs(whole.down, self.intermediate),
        )

    def adapter(self, whole: LayerAdapter) -> LayerAdapter:
        """What of it belongs to this rank's part of a layer."""
        if self.size == 1:
            return whole
        return LayerAdapter(
            qkv=whole.qkv and LowRank(whole.qkv.down, _concatenated(whole.qkv.up, self._heads)),
            out=whole.out and _columns_of(whole.out, self._queries),
            gate_up=whole.gate_up
            and LowRank(whole.gate_up.down, _concatenated(whole.gate_up.up, self._gate_up)),
            down=whole.down and _columns_of(whole.down, self.intermediate),
        )

    @property
    def _queries(self) -> range:
        return _scaled(self.query_heads, self.model.head_dim)

    @property
    def _heads(self) -> list[range]:
        """This rank's rows of queries, keys and values."""
        model, head_dim = self.model, self.model.head_dim
        keys = _scaled(self.kv_heads, head_dim, model.num_heads * head_dim)
        values = _scaled(self.kv_heads, head_dim, (model.num_heads + model.num_kv_heads) * head_dim)
        return [self._queries, keys, values]

    @property
    def _gate_up(self) -> list[range]:
        return [_scaled(self.intermediate, 1, before) for before in (0, self.model.intermediate_size)]

    def embedding(self, whole: EmbeddingWeights) -> EmbeddingWeights:
        """This rank's tokens."""
        if self.size == 1:
            return whole
        head = None if whole.head is None else _rows(whole.head, [self.vocabulary])
        return replace(whole, embedding=_rows(whole.embedding, [self.vocabulary]), head=head)

    def _inputs(self, affine: Affine, part: range) -> Affine:
        """Some inputs; the bias belongs to rank 0, since all ranks' results are added up."""
        try:
            weight = columns_of(affine.weight, part)
        except ValueError as error:
            raise UnsupportedModelError(
                f"this quantized model cannot be split over {self.size} ranks: {error}"
            ) from error
        return Affine(weight, None if self.rank else affine.bias)


class ShardedEmbedding:
    """ops.layers.Embedding of all tokens, of which this rank has those of `vocabulary`."""

    def __init__(self, own: Embedding, vocabulary: range, comm: Comm):
        self._own, self._vocabulary, self._comm = own, vocabulary, comm

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        at = ids - self._vocabulary.start
        is_elsewhere = (at < 0) | (at >= len(self._vocabulary))
        found = self._own.embed(at.masked_fill(is_elsewhere, 0)).masked_fill(is_elsewhere[:, None], 0)
        self._comm.all_reduce(found)
        return found

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        return self._comm.gather(self._own.logits(residual))


def make_shard(config: DecoderConfig, rank: int, size: int) -> Shard:
    """The part of rank `rank` of `size`. Raises UnsupportedModelError with the sizes that are possible."""
    if not _fits(config, size):
        sizes = [count for count in range(1, config.num_heads + 1) if _fits(config, count)]
        raise UnsupportedModelError(
            f"tensor_parallel_size is {size}, which does not fit a model with {config.num_heads} heads, "
            f"{config.num_kv_heads} KV heads and an MLP of {config.intermediate_size}; possible are "
            f"{', '.join(map(str, sizes))}"
        )
    queries, kept = _heads(config, rank, size)
    even = (width for width in _WIDTHS if config.intermediate_size % (width * size) == 0)
    width = next(even, _NARROWEST)
    return Shard(
        model=config,
        rank=rank,
        size=size,
        query_heads=queries,
        kv_heads=kept,
        intermediate=_part(config.intermediate_size, rank, size, width),
        vocabulary=_part(config.vocab_size, rank, size, 64 if config.vocab_size >= 64 * size else 1),
    )


def _fits(config: DecoderConfig, size: int) -> bool:
    if size == 1:
        return True
    kept, width = config.num_kv_heads, config.intermediate_size
    shares = size % kept == 0 and (config.num_heads // kept) % (size // kept) == 0
    has_mlp = width % _NARROWEST == 0 and width // _NARROWEST >= size
    return has_mlp and config.vocab_size >= size and (size <= kept or shares)


def _heads(config: DecoderConfig, rank: int, size: int) -> tuple[range, range]:
    """Query heads and the KV heads that they need."""
    kept, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    if size <= kept:
        own = _part(kept, rank, size)
        return _scaled(own, group), own
    ranks_of_head = size // kept
    each, own_head = group // ranks_of_head, rank // ranks_of_head
    return range(rank * each, (rank + 1) * each), range(own_head, own_head + 1)


def _part(total: int, rank: int, size: int, unit: int = 1) -> range:
    """A share in whole units; the last rank's may end with a part of one. Rank 0, which has other work, never
    has more than another.
    """
    units = -(-total // unit)
    first, last = (units * edge // size * unit for edge in (rank, rank + 1))
    return range(first, min(last, total))


def _scaled(part: range, factor: int, offset: int = 0) -> range:
    return range(offset + part.start * factor, offset + part.stop * factor)


def _outputs(affine: Affine, parts: list[range]) -> Affine:
    bias = None if affine.bias is None else _concatenated(affine.bias, parts)
    return Affine(_rows(affine.weight, parts), bias)


def _rows(weight: Weight, parts: list[range]) -> Weight:
    return rearranged(weight, lambda rows: _concatenated(rows, parts))


def _concatenated(rows: torch.Tensor, parts: list[range]) -> torch.Tensor:
    return torch.cat([rows[part.start : part.stop] for part in parts])


def _columns_of(whole: LowRank, part: range) -> LowRank:
    """Of some inputs: all ranks' results are added up."""
    return LowRank(whole.down[:, part.start : part.stop], whole.up)
