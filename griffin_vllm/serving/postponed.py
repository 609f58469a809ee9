"""KV cache entries of the head that nobody needs yet, written many at once.

While a batch-size schedule asks for no drafts, each step adds one token a request to the head's KV cache and
nothing reads it. Written step by step that costs more than its arithmetic: a pass over the head's weights for
a handful of tokens, and everything vLLM does around a pass. Where the head's cache has its blocks to itself
(``GriffinProposer.initialize_attn_backend``) all reads and writes there are the proposer's own, so putting a write off
until just before the next thing that it does changes nothing, not even where a block has gone to another request in
between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Enough for the matrix products to be as fast a token as they get, few enough for the step that writes them all
# not to be noticed among its neighbours.
MOST = 256


class PostponedWrites:
    """Tokens whose cache entries are still to be written by ``write(input_ids, positions, hidden_states, slots)``.

    Shapes are (N,), (N,), (N, d) and (N,), for N tokens of any requests and steps.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._waiting: list[tuple[torch.Tensor, ...]] = []
        self._count = 0

    def add(self, *inputs: torch.Tensor) -> None:
        """Take copies: the model runner's own tensors hold something else after the step."""
        self._waiting.append(tuple(tensor.clone() for tensor in inputs))
        self._count += len(inputs[0])
        if self._count >= MOST:
            self.write()

    def write(self) -> None:
        """Write all of them; of several for one slot the last one, for a block may have gone to another request."""
        if self._waiting:
            inputs = [torch.cat(parts) for parts in zip(*self._waiting, strict=True)]
            last = {slot: row for row, slot in enumerate(inputs[-1].tolist())}
            if len(last) < self._count:
                rows = torch.tensor(sorted(last.values()), device=inputs[-1].device)
                inputs = [tensor[rows] for tensor in inputs]
            self._write(*inputs)
            self._waiting, self._count = [], 0
