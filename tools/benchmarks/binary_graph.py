"""Binary graph against faiss, hnswlib and usearch: build, search, size, duplicates, scaling, cold start; on the CPU.

Each library measures in a process of its own, on the same codes and with the same threads, in turn and in the opposite
order each second round. The search takes one thread. Recall is tie-aware: a code counts that is as near as the true
10th. The claims compare with IndexBinaryHNSW, M = 16, efConstruction = 80; `sweep` shows its other settings, and the
tables the other libraries, where these are better too.

In the tables: CPU time of the build, time of the first small build with all compiling, peak memory of the process,
bytes of the stored index, queries a second at three recalls (>=: the narrowest search is above), the best recall with
the latency of single queries there, recall of the neighbour lists.

parts: compare (made codes), sweep (settings of HNSW), real (photographs, texts), duplicates, makespan, kernels, cold,
floats (re-ranking), engines (equal bytes; needs --engine).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _binary_data as sets
import _binary_floats as floats
import _binary_kernels as kernels
import _binary_measure as measure
import _binary_parts as parts
import _binary_real as real
import _binary_rivals as rivals

from alimm.report.benchmark import Claim, Outcome, print_table

PARTS = ("compare", "sweep", "real", "duplicates", "makespan", "kernels", "cold", "floats", "engines")
SIZES = {"100k": [100_000], "1m": [1_000_000], "all": [100_000, 1_000_000]}
QUICK_SIZE, QUICK_QUERIES = 2_000, 200
QUICK_OPTIONS = {"exact_below": 500, "cluster_size": 200, "max_cluster": 800}
"""So that even the small sets of --quick get a graph."""
RIVAL = "faiss HNSW"
BUILD_BOUNDS = {"clustered": 0.5, "diffuse": 0.8}
GRAPH_BOUND, RATE_BOUND, BYTES_BOUND, RATE_RECALL = 0.99, 1.5, 0.8, 0.95
SWEEP_M, SWEEP_EF = (12, 16, 24), (40, 80, 160)
LARGE = 500_000
"""From here on one round is measured, and hnswlib, which needs 32 times the memory, is left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--size", choices=SIZES, default="100k", help="codes of the made sets")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--engine", choices=("threads", "processes", "ray"), default="threads",
                        help="what builds; CPU time of Ray's workers is not seen")  # fmt: skip
    parser.add_argument("--libraries", default=",".join(rivals.LIBRARIES), help="libraries, with commas between")
    parser.add_argument("--threads", type=int, default=1, help="of each build")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, and searches in each")
    parser.add_argument("--cache", type=Path, help="folder of the sets; alimm's cache folder otherwise")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs, in place of the system's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="field of BuildConfig (JSON)")


def chosen(text: str, known: list[str], what: str) -> list[str]:
    """Names of a list with commas.

    Raises:
        ValueError: one of them is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(f"there is no {what} {', '.join(wrong) or '(none given)'}; there are: {', '.join(known)}")
    return names


def options_of(pairs: list[str]) -> dict[str, Any]:
    """Fields of BuildConfig from ``key=value``, the value as JSON where it is JSON."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the parts that are asked for, one after the other."""
    names = chosen(arguments.only, list(PARTS), "part")
    libraries = rivals.present(chosen(arguments.libraries, list(rivals.LIBRARIES), "library"))
    if arguments.threads < 1 or arguments.repeats < 1:
        raise ValueError("--threads and --repeats must be at least 1")
    arguments.options = options_of(arguments.set)
    sizes, arguments.queries = SIZES[arguments.size], sets.QUERIES
    if arguments.quick:
        sizes, arguments.queries, arguments.repeats = [QUICK_SIZE], QUICK_QUERIES, 1
        arguments.options = {**QUICK_OPTIONS, **arguments.options}
        names = [name for name in names if name not in ("real", "floats")]
    if arguments.engine == "threads":
        names = [name for name in names if name != "engines"]
    data: dict[str, Any] = {}
    claims: list[Claim] = []
    for name in names:
        print(f"\n== {name}", flush=True)
        claims += _part(name, sizes, libraries, arguments, data)
    if not claims:
        claims.append(Claim(f"parts {', '.join(names) or 'none'}", "measured", "none: they are only shown", True))
    return Outcome(claims, data)


def _part(name: str, sizes: list[int], libraries: list[str], given: Any, data: dict[str, Any]) -> list[Claim]:
    ours = rivals.OURS in libraries
    if name == "compare":
        return _compare(sizes, libraries, given, data)
    if name == "sweep":
        return _sweep(sizes[0], libraries, given, data)
    if name == "real":
        return _real(libraries, given, data)
    if name == "kernels":
        return kernels.measure(given.quick, 3 if given.quick else 9, data)
    if name == "duplicates":
        few = [library for library in libraries if library in (rivals.OURS, RIVAL, "usearch")]
        return parts.duplicates(sizes[0], given, few, data) if few else []
    if not ours:
        print(f"{name} is left out: it is about {rivals.OURS} alone")
        return []
    if name == "floats":
        try:
            floats.run(given.cache, given.repeats, None, data)
        except real.Missing as error:
            print(f"glosses are left out: {error}")
        return []
    made = sets.made("clustered", sizes[-1] if name == "makespan" else sizes[0], given.cache, queries=given.queries)
    return {"makespan": parts.makespan, "cold": parts.cold_start, "engines": parts.engines}[name](made, given, data)


def _measured(found: sets.CodeSet, libraries: list[str], given: Any, title: str) -> dict[str, measure.Record]:
    """Measure the libraries on a set and print the table."""
    print(found.line(), flush=True)
    large = found.notes["codes"] >= LARGE
    rounds = 1 if large else given.repeats
    jobs = [
        measure.Job(name, str(found.folder), parts.options(name, given), given.threads, (), given.repeats)
        for name in libraries
        if not (large and name == "hnswlib")
    ]
    merged = [measure.merge(records) for records in measure.run_jobs(jobs, rounds)]
    _print(f"{title}, {given.threads} build thread(s), 1 search thread, {rounds} round(s)", merged)
    return {record["library"]: record for record in merged}


def _print(title: str, merged: list[measure.Record]) -> None:
    rows = []
    for record in merged:
        rates = [measure.rate_at(record["search"], target) for target in measure.TARGETS]
        low, high = record["build_cpu_range"]
        best = max(record["search"], key=lambda point: point["recall"])
        graph = record["notes"].get("graph_recall")
        rows.append(
            [
                record["label"],
                f"{record['build_cpu']:.1f}" + (f" ({low:.1f}-{high:.1f})" if record["rounds"] > 1 else ""),
                f"{1e6 * record['build_cpu'] / record['points']:.0f}",
                f"{record['warm_up']:.1f}",
                f"{record['peak_bytes'] / 1e6:.0f}",
                f"{record['bytes'] / record['points']:.0f}",
                *("-" if rate is None else f"{'>=' if rate[1] else ''}{rate[0]:,.0f}" for rate in rates),
                f"{best['recall']:.4f}",
                f"{best['p50_us']:.0f}/{best['p99_us']:.0f}",
                "" if graph is None else f"{graph:.4f}",
            ]
        )
    header = ["library", "CPU s", "us/pt", "warm s", "peak MB", "B/pt"]
    header += [f"q/s@{target:g}" for target in measure.TARGETS] + ["recall", "p50/p99 us", "graph"]
    print_table(title, header, rows)


def _compare(sizes: list[int], libraries: list[str], given: Any, data: dict[str, Any]) -> list[Claim]:
    claims: list[Claim] = []
    ours: dict[tuple[str, int], measure.Record] = {}
    for size in sizes:
        for name in sets.RECIPES:
            made = sets.made(name, size, given.cache, queries=given.queries)
            found = _measured(made, libraries, given, made.name)
            data[f"compare_{made.name}"] = {"set": made.notes, "records": list(found.values())}
            if rivals.OURS in found:
                ours[name, size] = found[rivals.OURS]
                if RIVAL in found:
                    claims += judge(made.name, BUILD_BOUNDS[name], found[rivals.OURS], found[RIVAL])
    return claims + parts.growth(ours, sizes)


def judge(name: str, build_bound: float, ours: measure.Record, rival: measure.Record) -> list[Claim]:
    """The claims of one set: CPU time of the build, rate of the search, bytes."""
    built, size = ours["build_cpu"] / rival["build_cpu"], ours["bytes"] / rival["bytes"]
    graph = ours["notes"].get("graph_recall")
    known = float("nan") if graph is None else float(graph)
    rates = [measure.rate_at(record["search"], RATE_RECALL) for record in (ours, rival)]
    gain = rates[0][0] / rates[1][0] if rates[0] and rates[1] else float("nan")
    both = f"{gain:.2f}x"
    if any(rate and rate[1] for rate in rates):
        narrow = [min(record["search"], key=lambda point: point["width"])["recall"] for record in (ours, rival)]
        both += f" (narrowest searches: recall {narrow[0]:.4f} and {narrow[1]:.4f})"
    return [
        Claim(f"{name}: build CPU over {RIVAL}", f"{built:.2f}x at graph recall {known:.4f}",
              f"at most {build_bound:g}x at {GRAPH_BOUND:g}", built <= build_bound and known >= GRAPH_BOUND),
        Claim(f"{name}: queries/s at recall {RATE_RECALL:g} over {RIVAL}", both, f"at least {RATE_BOUND:g}x",
              gain >= RATE_BOUND),
        Claim(f"{name}: bytes a point over {RIVAL}", f"{size:.2f}x", f"at most {BYTES_BOUND:g}x", size <= BYTES_BOUND),
    ]  # fmt: skip


def _sweep(size: int, libraries: list[str], given: Any, data: dict[str, Any]) -> list[Claim]:
    """Settings of IndexBinaryHNSW: a cheaper build or a faster search than the default one has."""
    for name in sets.RECIPES:
        made = sets.made(name, size, given.cache, queries=given.queries)
        pairs = [(m, ef) for m in SWEEP_M for ef in SWEEP_EF]
        configs = [(RIVAL, {"M": m, "ef_build": ef}) for m, ef in (pairs[:2] if given.quick else pairs)]
        configs += [(rivals.OURS, parts.options(rivals.OURS, given))] if rivals.OURS in libraries else []
        jobs = [measure.Job(library, str(made.folder), config, given.threads) for library, config in configs]
        merged = [measure.merge(records) for records in measure.run_jobs(jobs, 1)]
        _print(f"{made.name}: settings of {RIVAL}", merged)
        data[f"sweep_{made.name}"] = merged
    return []


def _real(libraries: list[str], given: Any, data: dict[str, Any]) -> list[Claim]:
    makers = {
        "orb": lambda: real.photographs("orb", given.cache, given.photos),
        "brisk": lambda: real.photographs("brisk", given.cache, given.photos),
        "brief": lambda: real.photographs("brief", given.cache, given.photos),
        "glosses": lambda: real.gloss_codes("itq", given.cache),
    }
    for name, make in makers.items():
        try:
            found = make()
        except (real.Missing, ImportError) as error:
            print(f"{name} is left out: {error}")
            continue
        records = _measured(found, libraries, given, found.name)
        data[f"real_{name}"] = {"set": found.notes, "records": list(records.values())}
    return []
