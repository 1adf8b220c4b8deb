"""HierarchyVectors: as many classes as you like, in a two-level hierarchy, without a stored matrix.

Extreme classification needs N of a million and more, which no picture set at hand has. Here class c = a * F + b has the
centre

    m_c = u_a + spread * v_c            u_a: direction of the coarse class a; v_c: direction of its own

and sample i of class c is m_c + noise * e_i / sqrt(D), with u and v uniform on the unit sphere of D dimensions and e
normal. The F classes of one coarse class are near each other and far from the rest, so nearest neighbours are known and
a random choice of negatives misses them: with 1 / spread the hard negatives become harder.

Every number is a function of (seed, stream, index) alone: a counter goes through the finaliser of SplitMix64 (Steele et
al., Fast splittable pseudorandom number generators, OOPSLA 2014) and the Box-Muller transform. So any process makes the
same sample (but for the last bit of the machine's cosine), and a batch costs a batch of memory whatever N is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from numpy.typing import NDArray

from alimm.registry import DATASETS
from alimm.seeding import stream_seed
from alimm.structures import ClsDataSample

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def counter_bits(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for each counter: SplitMix64's output after so many steps from the state ``key``."""
    state = (counters + np.uint64(1)) * _GOLDEN + np.uint64(key)
    for shift, factor in _MIX:
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> np.uint64(31))


def counter_normals(key: int, rows: NDArray[np.int64], dim: int) -> NDArray[np.float64]:
    """Standard normal vectors, float64 (len(rows), dim): row r of the endless matrix that ``key`` names.

    Args:
        key: of the stream.
        rows: which rows, at least 0.
        dim: length of a row.
    """
    pairs = (dim + 1) // 2
    columns = np.arange(2 * pairs, dtype=np.uint64)
    counters: NDArray[np.uint64] = rows.astype(np.uint64)[:, None] * np.uint64(2 * pairs) + columns
    # 53 bits, shifted by half a step: never 0, whose logarithm is infinite.
    uniform = ((counter_bits(key, counters) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :pairs])), 2 * np.pi * uniform[:, pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :dim]


def _directions(key: int, rows: NDArray[np.int64], dim: int) -> NDArray[np.float64]:
    vectors = counter_normals(key, rows, dim)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@DATASETS.register_module()
class HierarchyVectors(BaseDataset):
    """Vectors of N = coarse * fine classes, made when they are asked for.

    Items carry ``vector`` (float32, (dim,)), ``gt_label`` (coarse class * fine + place in it), ``gt_identity`` (the
    coarse class) and ``sample_id`` (``train/0000017``). A batch is packed for `alimm.VectorPreprocessor`: ``inputs``
    the vector, ``data_samples`` with both labels. ``metainfo`` holds ``num_classes``, ``coarse`` and ``fine``; there
    are no names of classes.

    Args:
        coarse: number of coarse classes.
        fine: classes of each.
        dim: D, the length of a vector.
        samples_per_class: samples of each class on this side.
        spread: distance of a class from the centre of its coarse class; coarse centres are about sqrt(2) apart.
        noise: length of the noise, on average.
        subset: ``'train'`` or ``'test'``: the same classes, other noise.
        num_samples: take so many samples, spread evenly over the classes; None takes all. A test on all of a million
            classes takes longer than the training.
        seed: of centres and noise.
        metainfo: more meta information.
        lazy_init: of MMEngine's BaseDataset; there is nothing to load.
        test_mode: of MMEngine's BaseDataset.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        coarse: int,
        fine: int,
        dim: int = 128,
        samples_per_class: int = 1,
        spread: float = 0.5,
        noise: float = 1.0,
        subset: str = "train",
        num_samples: int | None = None,
        seed: int = 0,
        metainfo: dict[str, Any] | None = None,
        lazy_init: bool = False,
        test_mode: bool = False,
    ) -> None:
        if subset not in ("train", "test"):
            raise ValueError(f"HierarchyVectors: subset must be train or test, got {subset!r}")
        for name, value in dict(coarse=coarse, fine=fine, dim=dim, samples_per_class=samples_per_class).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"HierarchyVectors: {name} must be a whole number of at least 1, got {value!r}")
        for name, length in dict(spread=spread, noise=noise).items():
            if not 0 <= length < float("inf"):
                raise ValueError(f"HierarchyVectors: {name} must be a number of at least 0, got {length!r}")
        total = coarse * fine * samples_per_class
        if total * dim >= 2**62:
            raise ValueError(f"HierarchyVectors: {total:,} samples of {dim} numbers are more than can be counted")
        # Below 2^31, the product of two places fits int64.
        if num_samples is not None and not 1 <= num_samples <= min(total, 2**31 - 1):
            raise ValueError(
                f"HierarchyVectors: num_samples must be None or 1 to {min(total, 2**31 - 1)}, got {num_samples!r}"
            )
        self.coarse, self.fine, self.dim, self.samples_per_class = coarse, fine, dim, samples_per_class
        self.spread, self.noise, self.subset, self.seed = float(spread), float(noise), subset, seed
        self._total, self._length = total, total if num_samples is None else num_samples
        self._keys = {
            name: stream_seed(seed, f"hierarchy_vectors/{name}") for name in ("coarse", "fine", "noise/" + subset)
        }
        given = dict(num_classes=coarse * fine, coarse=coarse, fine=fine)
        super().__init__(metainfo={**given, **(metainfo or {})}, lazy_init=lazy_init, test_mode=test_mode)

    @property
    def num_classes(self) -> int:
        """N = coarse * fine."""
        return self.coarse * self.fine

    def full_init(self) -> None:
        """Nothing is loaded: items are made from their index."""
        self._fully_initialized = True

    def __len__(self) -> int:
        return self._length

    def centres(self, class_ids: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
        """The centres of some classes, float64 (len(class_ids), D).

        Raises:
            IndexError: there is no such class.
        """
        classes = self._checked(class_ids, self.num_classes, "class")
        coarse = _directions(self._keys["coarse"], classes // self.fine, self.dim)
        return coarse + self.spread * _directions(self._keys["fine"], classes, self.dim)

    def vectors(self, indices: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float32]:
        """The vectors of some items, float32 (len(indices), D).

        Raises:
            IndexError: there is no such item.
        """
        samples = self._samples(indices)
        noise = counter_normals(self._keys["noise/" + self.subset], samples, self.dim)
        centres = self.centres(samples // self.samples_per_class)
        return (centres + self.noise / np.sqrt(self.dim) * noise).astype(np.float32)

    def labels(self, indices: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        """The classes of some items, int64 (len(indices),)."""
        return np.asarray(self._samples(indices) // self.samples_per_class)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The item ``idx``, before it is packed."""
        label = int(self.labels([idx])[0])
        place = idx % len(self)
        return dict(
            vector=self.vectors([idx])[0],
            gt_label=label,
            gt_identity=label // self.fine,
            sample_id=self._sample_id(place),
            sample_idx=place,
        )

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of item ``idx``, as MMEngine's dataset wrappers ask for it."""
        return [int(self.labels([idx])[0])]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.__getitems__([idx])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The packed items of a batch, made at once; torch's loader calls this where a data set has it."""
        vectors = torch.from_numpy(self.vectors(indices))
        return [
            dict(
                inputs=vector,
                data_samples=ClsDataSample(metainfo=dict(sample_id=self._sample_id(idx % len(self))))
                .set_gt_label(label)
                .set_gt_identity(label // self.fine),
            )
            for idx, vector, label in zip(indices, vectors, self.labels(indices).tolist(), strict=True)
        ]

    def get_subset_(self, indices: Sequence[int] | int) -> None:
        """Not here: there is no list to cut.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "HierarchyVectors has no list of items to cut: set num_samples, or take torch.utils.data.Subset"
        )

    get_subset = get_subset_

    def _sample_id(self, place: int) -> str:
        return f"{self.subset}/{place * self._total // self._length:07d}"

    def _samples(self, indices: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        """Numbers of the samples among all of them; a negative index counts from the end."""
        wanted = np.asarray(indices, np.int64)
        places = self._checked(np.where(wanted < 0, wanted + len(self), wanted), len(self), "item")
        if self._length == self._total:
            return places
        step, rest = divmod(self._total, self._length)
        return places * step + places * rest // self._length

    @staticmethod
    def _checked(values: NDArray[np.int64] | Sequence[int], count: int, name: str) -> NDArray[np.int64]:
        array = np.asarray(values, np.int64)
        bad = array[(array < 0) | (array >= count)]
        if len(bad):
            raise IndexError(f"HierarchyVectors: there is no {name} {int(bad[0])}, they are 0 to {count - 1}")
        return array
