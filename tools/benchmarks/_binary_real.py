"""Codes of real things for the benchmark of binary graphs: descriptors of photographs, hashed glosses of WordNet.

ORB (256 bits) and BRISK or BRIEF (512 bits) are binary by nature. The base holds the descriptors of each photograph at
several scales and rotations; the queries are those of the same photographs seen as by a camera: tilted and blurred.
The glosses are embedded by TF-IDF and a singular value decomposition, which needs no model, and hashed by this
project's hashers; their float vectors stay beside the codes, as truth of the re-ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _binary_data as data
import numpy as np
from numpy.typing import NDArray

from alimm.extras import require

PHOTO_FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers", "/usr/share/doc/opencv-doc/examples")
PHOTO_PACKAGES = "plasma-workspace-wallpapers, mate-backgrounds or opencv-doc"
WORDNET = Path("/usr/share/wordnet")
PHOTO_WANTED, SIDE, SMALLEST = 100_000, 1_200, 60_000
SCALES, ANGLES = (1.0, 0.7, 0.5), (0.0, 25.0)
EMBED_DIM, EMBED_QUERIES = 256, 5_000
FLOAT_K = 10


class Missing(Exception):
    """Data that this machine lacks; the message says which package brings them."""


@dataclass(frozen=True)
class FloatSet:
    """Unit vectors behind codes; ``truth`` holds the ids of each query's FLOAT_K nearest by inner product."""

    folder: Path

    def load(self, part: str) -> NDArray[Any]:
        """``base`` float32 (n, D), ``queries`` float32 (Q, D) or ``truth`` int64 (Q, FLOAT_K)."""
        return np.load(self.folder / f"{part}.npy", mmap_mode="r" if part == "base" else None)


def photo_files(folder: Path | None) -> list[Path]:
    """Photographs: packaged ones of scikit-image and scikit-learn, and files of at least 60 kB; no file twice."""
    import skimage.data
    import sklearn.datasets

    places = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    places += [folder] if folder is not None else [Path(name) for name in PHOTO_FOLDERS]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file():
                if path.stat().st_size < SMALLEST:
                    continue
                found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return list(found.values())


def photographs(kind: str, cache: Path | None, folder: Path | None = None, wanted: int = PHOTO_WANTED) -> data.CodeSet:
    """Descriptors of photographs.

    Args:
        kind: ``'orb'``, ``'brisk'``, or ``'brief'``, of scikit-image, 512 bits at ORB's key points: OpenCV 5 keeps
            BRISK in its contributed modules. BRIEF does not follow rotations, so its base has only upright views.
        cache: folder of the sets; None takes alimm's.
        folder: of photographs, in place of the usual folders of the system.
        wanted: codes of the base.

    Raises:
        Missing: the photographs give fewer than half of the codes wanted.
    """
    files = photo_files(folder)
    names = hashlib.sha256("\n".join(f"{path.name} {path.stat().st_size}" for path in files).encode()).hexdigest()[:8]

    def build() -> tuple[NDArray[np.uint64], NDArray[np.uint64], dict[str, Any]]:
        angles = ANGLES[:1] if kind == "brief" else ANGLES
        each = max(50, round(1.5 * wanted / (len(SCALES) * len(angles) * max(1, len(files)))))
        base, queries, used = [], [], 0
        for number, path in enumerate(files):
            picture = _read(path)
            if picture is None:
                continue
            used += 1
            views = [_turn(picture, angle, scale) for scale in SCALES for angle in angles]
            base += [_describe(kind, view, each) for view in views]
            queries.append(_describe(kind, _camera(picture, number), max(20, 2 * data.QUERIES // len(files))))
        rng = np.random.default_rng([0, 7])
        codes, asked = _words(base), _words(queries)
        if len(codes) < wanted // 2 or not len(asked):
            raise Missing(
                f"{used} photographs gave {len(codes)} descriptors where {wanted} were wanted: install "
                f"{PHOTO_PACKAGES} (Debian), or name a folder of photographs with --photos"
            )
        codes = codes[rng.permutation(len(codes))[:wanted]]
        return codes, asked[rng.permutation(len(asked))[: data.QUERIES]], {"photographs": used}

    label = f"{kind}-{data.size_text(wanted)}"
    return data.keep(f"{label}-{names}-v{data.VERSION}", label, cache, build)


def _read(path: Path) -> NDArray[np.uint8] | None:
    """Grey picture with sides of at most SIDE; None for what is no picture."""
    cv2 = require("cv2", "reading photographs")
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if picture is None or min(picture.shape) < 128:
        return None
    shrink = SIDE / max(picture.shape)
    return cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else picture


def _turn(picture: NDArray[np.uint8], angle: float, scale: float) -> NDArray[np.uint8]:
    """The picture scaled, and rotated about its centre."""
    cv2 = require("cv2", "turning photographs")
    if scale != 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    if not angle:
        return picture
    height, width = picture.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    return cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


def _camera(picture: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """The picture as photographed again: tilted, turned a little, blurred, of other brightness."""
    cv2 = require("cv2", "warping photographs")
    rng = np.random.default_rng([0, 8, seed])
    height, width = picture.shape
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    moved = (corners + rng.uniform(-0.06, 0.06, (4, 2)) * [width, height]).astype(np.float32)
    picture = cv2.warpPerspective(
        picture, cv2.getPerspectiveTransform(corners, moved), (width, height), borderMode=cv2.BORDER_REFLECT
    )
    picture = cv2.GaussianBlur(
        _turn(picture, rng.uniform(-15, 15), rng.uniform(0.7, 1.0)), (0, 0), rng.uniform(0.5, 1.5)
    )
    return np.clip(picture * rng.uniform(0.6, 1.3) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)


def _describe(kind: str, picture: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Descriptors of the strongest `count` key points, uint8 (n, bytes)."""
    cv2 = require("cv2", "describing photographs")
    cv2.setNumThreads(1)
    if kind in ("orb", "brief"):
        finder = cv2.ORB_create(nfeatures=count, fastThreshold=10)
        if kind == "brief":
            return _brief(picture, finder.detect(picture, None))
        found = finder.detectAndCompute(picture, None)[1]
        return np.empty((0, 32), np.uint8) if found is None else found
    maker = getattr(cv2, "BRISK_create", None) or getattr(getattr(cv2, "xfeatures2d", None), "BRISK_create", None)
    if maker is None:
        raise Missing("this OpenCV has no BRISK: install opencv-contrib-python-headless, or OpenCV 4")
    finder = maker(thresh=20)
    points = sorted(finder.detect(picture, None), key=lambda point: (-point.response, point.pt))[:count]
    found = finder.compute(picture, points)[1] if points else None
    return np.empty((0, 64), np.uint8) if found is None else found


def _brief(picture: NDArray[np.uint8], points: Any) -> NDArray[np.uint8]:
    from skimage.feature import BRIEF

    finder = BRIEF(descriptor_size=512)
    if not len(points):
        return np.empty((0, 64), np.uint8)
    finder.extract(picture / 255.0, np.array([point.pt[::-1] for point in points]))
    return np.packbits(finder.descriptors, axis=1, bitorder="little")


def _words(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    kept = [part for part in parts if len(part)]
    if not kept:
        return np.empty((0, 1), np.uint64)
    return np.ascontiguousarray(np.concatenate(kept)).view("<u8").astype(np.uint64, copy=False)


def gloss_texts(folder: Path = WORDNET) -> Iterator[str]:
    """``word, word: gloss`` of each set of synonyms."""
    if not (folder / "data.noun").exists():
        raise Missing(f"there is no WordNet in {folder}: install wordnet-base (Debian)")
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" ") or " | " not in line:
                continue  # the licence
            fields, gloss = line.split(" | ", 1)
            columns = fields.split()
            words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            yield f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"


def gloss_floats(cache: Path | None, limit: int | None = None) -> FloatSet:
    """Unit vectors of the glosses: TF-IDF of words and of runs of 3 and 4 letters, and its 256 main directions.

    Raises:
        Missing: WordNet is not installed.
    """
    folder = data.data_folder(cache) / f"glosses-floats-{limit or 'all'}-v{data.VERSION}"
    if not (folder / "truth.npy").exists():
        from scipy.sparse import hstack
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = list(gloss_texts())[:limit]
        words = TfidfVectorizer(sublinear_tf=True, min_df=3, dtype=np.float32).fit_transform(texts)
        runs = TfidfVectorizer(
            sublinear_tf=True, min_df=5, max_features=50_000, analyzer="char_wb", ngram_range=(3, 4), dtype=np.float32
        ).fit_transform(texts)
        found = TruncatedSVD(EMBED_DIM, n_iter=3, random_state=0).fit_transform(hstack([words, runs]).tocsr())
        vectors = (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        order = np.random.default_rng([0, 6]).permutation(len(vectors))
        queries, base = vectors[order[:EMBED_QUERIES]], vectors[order[EMBED_QUERIES:]]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "base.npy", base)
        np.save(folder / "queries.npy", queries)
        # The truth comes last: the folder is complete when it is there.
        np.save(folder / "truth.partial.npy", _nearest_floats(base, queries))
        (folder / "truth.partial.npy").rename(folder / "truth.npy")
    return FloatSet(folder)


def _nearest_floats(base: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    import faiss

    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base))
    return index.search(np.ascontiguousarray(queries), FLOAT_K)[1]


def gloss_codes(hasher: str, cache: Path | None, bits: int = data.BITS, limit: int | None = None) -> data.CodeSet:
    """The glosses hashed by one of the project's hashers; row i of the base is row i of the float vectors."""
    from alimm.projects.binary_graph.hashers import make_hasher

    floats = gloss_floats(cache, limit)

    def build() -> tuple[NDArray[np.uint64], NDArray[np.uint64], dict[str, Any]]:
        base = np.asarray(floats.load("base"))
        rows = np.random.default_rng([0, 5]).permutation(len(base))[:30_000]
        fitted = make_hasher(hasher, bits, 0)
        fitted.fit(base[rows])
        return fitted.encode(base), fitted.encode(floats.load("queries")), {"hasher": hasher}

    label = f"glosses-{hasher}"
    return data.keep(f"{label}-{bits}-{limit or 'all'}-v{data.VERSION}", label, cache, build)
