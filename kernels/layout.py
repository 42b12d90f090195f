"""Where every parameter stands in the flat buffers: pure arithmetic, no tensors.

Shapes: K tasks, P parameters shared by all tasks, D of them in weights of linear layers, V words, H
hidden_size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

SHARED = "shared"  # the owner of the encoder's parameters; the others are owned by a task
# Kinds of parameters in the order in which they stand: the word embeddings, others, weights of linear layers.
WORDS, OTHER, MATRIX = range(3)


def layer_group_name(name: str) -> str:
    """The layer group that an encoder parameter is in: `embeddings`, `layer.0`, `layer.1`, ..., `pooler`."""
    layer = re.match(r"encoder\.(layer\.\d+)\.", name)
    return layer[1] if layer else name.partition(".")[0]


@dataclass(frozen=True)
class ParamRow:
    """A parameter to be placed."""

    name: str
    shape: tuple[int, ...]
    decays: bool
    kind: int = OTHER


@dataclass(frozen=True)
class Layout:
    """Where every parameter stands in the flat buffers.

                 |<----------- shared: the encoder, P elements --------->|<- one head -->|<- next head ..
                 |<----------- decays ------------>|<- does not decay -->| decays | not  | decays | not
        data     | words | tables | linear weights | biases, LayerNorm   | weight | bias | weight | bias
        grad     | words | tables | linear weights | biases, LayerNorm   | weight | bias | weight | bias
                 0       |        |                |                     |                              |
                   words.stop  matrices.start  matrices.stop         num_shared                        size

    `grad` takes the combined gradient of the encoder, and the gradients of the heads. The encoder's gradients
    by task stand in two matrices with a row per task; together they have the columns of the shared part:

        other_grads  (K, P - D)   | words | tables |                | biases, LayerNorm |
        matrix_grads (K, D)                        | linear weights |

    Two, so that those of linear layers, nearly all that is not a word, can be bfloat16 or float16: half
    the memory to write and to read. The rest stays float32, since it is added up in many small pieces (a word
    occurs more than once, a bias is summed over tokens), each of which those would round. In float32 runs,
    and where micro-batches are accumulated, both are float32.

    Everything that decays is contiguous, so the optimizer sees it as one parameter. Within it, words come
    first and linear weights last, so that each is one range: of words only the rows that occur in a step are
    touched, and the weights are converted in one go. Tables are the position and segment
    embeddings.

    Args:
        places: (owner, name) -> the range of a parameter, in the order of the buffer.
        blocks: (owner, decays) -> the range of all of them, maybe empty.
        words: the word embeddings; empty if they are frozen.
        matrices: the weights of linear layers.
    """

    places: dict[tuple[str, str], slice]
    blocks: dict[tuple[str, bool], slice]
    words: slice
    matrices: slice

    @property
    def num_shared(self) -> int:
        """P"""
        return self.blocks[SHARED, False].stop

    @property
    def num_matrix(self) -> int:
        """D"""
        return self.matrices.stop - self.matrices.start

    @property
    def size(self) -> int:
        return max(where.stop for where in self.blocks.values())

    @cached_property
    def sections(self) -> list[slice]:
        """The shared part cut into words, tables, linear weights, and the rest, leaving out empty ones."""
        stops = (0, self.words.stop, self.matrices.start, self.matrices.stop, self.num_shared)
        return [slice(start, stop) for start, stop in pairwise(stops) if start < stop]

    @cached_property
    def layer_groups(self) -> dict[str, list[slice]]:
        """Layer group of the encoder -> its ranges: as few as possible, each in one section."""
        groups: dict[str, list[slice]] = {}
        starts = {section.start for section in self.sections}
        for (owner, name), where in self.places.items():
            if owner == SHARED:
                ranges = groups.setdefault(layer_group_name(name), [])
                if ranges and ranges[-1].stop == where.start and where.start not in starts:
                    where = slice(ranges.pop().start, where.stop)  # side by side: one range
                ranges.append(where)
        return groups

    def layer_factors(self, decay: float) -> list[tuple[slice, float]]:
        """Ranges of the encoder, each with a factor of its learning rate: `decay` for each layer down.

        The top layer and the pooler keep theirs, the embeddings, below all layers, get the least. So do
        ELECTRA (https://arxiv.org/abs/2003.10555, whose code starts one layer further down) and XLNet
        (https://arxiv.org/abs/1906.08237, whose code leaves the embeddings' rate as it is).
        """
        depths = {name: int(name[6:]) + 1 for name in self.layer_groups if name.startswith("layer.")}
        top = max(depths.values(), default=0)
        depths |= {"embeddings": 0, "pooler": top}
        return [
            (where, decay ** (top - depths.get(name, top)))
            for name, ranges in self.layer_groups.items()
            for where in ranges
        ]

    def is_matrix(self, where: slice) -> bool:
        """Whether a range is in the linear weights."""
        return self.matrices.start <= where.start < self.matrices.stop

    def columns(self, where: slice) -> slice:
        """A range in one section as columns of its matrix, `matrix_grads` or `other_grads`."""
        skipped = 0
        if self.is_matrix(where):
            skipped = self.matrices.start
        elif where.start >= self.matrices.stop:
            skipped = self.num_matrix
        return slice(where.start - skipped, where.stop - skipped)


def make_layout(encoder: Sequence[ParamRow], heads: Mapping[str, Sequence[ParamRow]]) -> Layout:
    """Place the encoder's parameters, then each head's: first what decays, sorted by kind, then the rest."""
    places, blocks, offset = {}, {}, 0
    for owner, rows in ((SHARED, encoder), *heads.items()):
        for decays in (True, False):
            start = offset
            # Stable: query, key and value keep their order, lie end to end, and can share one product.
            for row in sorted((row for row in rows if row.decays == decays), key=lambda row: row.kind):
                places[owner, row.name] = slice(offset, offset + math.prod(row.shape))
                offset = places[owner, row.name].stop
            blocks[owner, decays] = slice(start, offset)
    kinds = {row.name: row.kind for row in encoder}
    words = [where for (owner, name), where in places.items() if owner == SHARED and kinds[name] == WORDS]
    matrices = [where for (owner, name), where in places.items() if owner == SHARED and kinds[name] == MATRIX]
    stop = blocks[SHARED, True].stop
    return Layout(
        places,
        blocks,
        words=words[0] if words else slice(0, 0),
        matrices=slice(matrices[0].start if matrices else stop, stop),
    )
