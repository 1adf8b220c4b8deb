"""What a build is given by its caller, made into what the builder takes. Who only searches imports none of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from alimm.projects.binary_graph.packing import check_codes
from alimm.projects.binary_graph.segment import Segment

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig
    from alimm.projects.binary_graph.engine import Engine


def source_of(codes: Any) -> tuple[Any, int, int]:
    """Codes as `BinaryGraph.build` takes them, how many, and words of each.

    Raises:
        ValueError: neither codes nor a source of them.
    """
    if hasattr(codes, "read"):
        return codes, codes.count, codes.words
    array = None if isinstance(codes, os.PathLike) else np.asarray(codes)
    if array is None or array.dtype.kind in "SU":
        raise ValueError(
            f"codes must be an array or a source, got the name {str(codes)[:80]!r}; source_from of "
            "alimm.projects.binary_graph.sources makes a source of files"
        )
    array = check_codes("codes", array)
    return array, array.shape[0], array.shape[1]


def config_of(config: BuildConfig | dict[str, Any] | None) -> BuildConfig:
    """Settings as an object.

    Raises:
        ValueError: a name that is none, or a value that does not fit.
    """
    from alimm.projects.binary_graph.config import BuildConfig

    if config is None or isinstance(config, dict):
        return BuildConfig.from_dict(config or {})
    if not isinstance(config, BuildConfig):
        raise ValueError(f"config must be a BuildConfig or a dict of its settings, got {type(config).__name__}")
    return config


def build_segment(*arguments: Any, **options: Any) -> Segment:
    """`pipeline.build_segment`, imported when it is needed."""
    from alimm.projects.binary_graph import pipeline

    return pipeline.build_segment(*arguments, **options)


@contextmanager
def engine_of(engine: str | Engine, workers: int | None, worker_memory: int | None) -> Iterator[Engine]:
    """An engine by its name, closed in the end; or one that is there, which stays open."""
    from alimm.projects.binary_graph.engine import make_engine

    if not isinstance(engine, str):
        yield engine
        return
    with make_engine(engine, workers, worker_memory) as made:
        yield made


@contextmanager
def bars(show: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Bars on standard error, or None."""
    if not show:
        yield None
        return
    from alimm.projects.binary_graph.engine import ProgressBars

    made = ProgressBars()
    try:
        yield made
    finally:
        made.close()
