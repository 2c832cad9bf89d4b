"""The SHA-256 chain of a prompt's pages, beside hashlib once a page, hashlib once for all, and SGLang's own way.

``python -m bench.bench_page_hash [--quick] [--rounds 31] [--json FILE]``. The machine may be shared: times are CPU time
of the one thread that works; in each round all run one after the other on the same prompt, ours between two of
hashlib's; and the figures are medians over the rounds of times and of hashlib's (mean of both neighbours) over ours.
``one digest`` hashes all bytes of the prompt at once: the machine's own limit for these tokens, were nothing chained.
Results are compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radixkv import RadixTree
from radixkv.tree.page_hash import sha256_chain, sha256_page_hash, sha256_provider

from . import report

SEED = 7
PROMPT_TOKENS = 131_072
PAGE_SIZES = (16, 1, 64)
TARGET_PAGE_SIZE, TARGET = 16, 3.0
"""At least so many times as fast as one ``hashlib.sha256(previous + page).digest()`` a page."""


def by_hashlib(tokens: npt.NDArray[np.int32], page_size: int) -> list[bytes]:
    """One call of hashlib a page, on bytes made beforehand once for the prompt: the least that Python can do."""
    prompt, page_bytes = tokens.tobytes(), 4 * page_size
    digests, digest = [], b""
    for at in range(0, len(prompt), page_bytes):
        digest = hashlib.sha256(digest + prompt[at : at + page_bytes]).digest()
        digests.append(digest)
    return digests


def as_sglang_does(tokens: list[int], page_size: int) -> list[str]:
    """An update a token and a hex digest a page, as ``get_hash_str`` of SGLang 0.5.0rc0."""
    digests, prior = [], ""
    for at in range(0, len(tokens), page_size):
        page = hashlib.sha256()
        if prior:
            page.update(bytes.fromhex(prior))
        for token in tokens[at : at + page_size]:
            page.update(token.to_bytes(4, byteorder="little", signed=False))
        digests.append(prior := page.hexdigest())
    return digests


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(ms of CPU time, result)."""
    start = time.thread_time_ns()
    result = function()
    return (time.thread_time_ns() - start) / 1e6, result


def digest_in_tree(tokens: npt.NDArray[np.int32], page_size: int) -> Callable[[], Any]:
    """page_digests of a prompt that a fresh tree holds: the chain by the tree's callback, and the copy out."""
    tree = RadixTree(page_size, page_hash=sha256_page_hash())
    node = tree.insert(tokens, np.arange(len(tokens) // page_size, dtype=np.int32)).node
    return lambda: tree.page_digests(node)


def measure(page_size: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """All ways on one prompt. Raises: RuntimeError if two disagree."""
    tokens = np.random.default_rng(SEED).integers(0, 128_000, num_tokens, dtype=np.int32)
    listed = tokens.tolist()
    times: dict[str, list[float]] = {"chain": [], "hashlib": [], "sglang": [], "one digest": [], "in a tree": []}
    ratios = []
    before, wanted = timed(lambda: by_hashlib(tokens, page_size))
    for _ in range(rounds):
        taken, chain = timed(lambda: sha256_chain(tokens, page_size))
        after, _ = timed(lambda: by_hashlib(tokens, page_size))
        in_tree, digests = timed(digest_in_tree(tokens, page_size))
        if chain.tobytes() != b"".join(wanted) or digests.tobytes() != chain.tobytes():
            raise RuntimeError(f"page size {page_size}: the chains differ")
        ratios.append((before + after) / 2 / taken)
        for name, value in (("chain", taken), ("hashlib", after), ("in a tree", in_tree)):
            times[name].append(value)
        times["one digest"].append(timed(lambda: hashlib.sha256(tokens).digest())[0])
        if len(times["sglang"]) < max(1, rounds // 8):  # slow
            taken, theirs = timed(lambda: as_sglang_does(listed, page_size))
            if theirs != [digest.hex() for digest in wanted]:
                raise RuntimeError(f"page size {page_size}: SGLang's chain differs")
            times["sglang"].append(taken)
        before, _ = timed(lambda: by_hashlib(tokens, page_size))
    medians = {f"{name.replace(' ', '_')}_ms": statistics.median(values) for name, values in times.items()}
    return {
        "page_size": page_size,
        "tokens": num_tokens,
        "pages": num_tokens // page_size,
        "ratio": statistics.median(ratios),
        "ns_a_page": medians["chain_ms"] * 1e6 / (num_tokens // page_size),
        **medians,
    }


def checks(rows: list[dict[str, Any]]) -> list[report.Check]:
    """report's checks are upper limits: our time over hashlib's."""
    row = next(row for row in rows if row["page_size"] == TARGET_PAGE_SIZE)
    what = f"SHA-256 chain of {row['tokens']:,} tokens, page {row['page_size']}: time / hashlib once a page"
    return [report.Check(what, 1 / row["ratio"], 1 / TARGET, "x", sha256_provider())]


def main() -> None:
    """Command line. See report.conclude for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short prompt, 3 rounds: shows that everything runs")
    parser.add_argument("--rounds", type=int, help="alternating rounds (31; 3 with --quick)")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "page_hash.json", help="where it goes")
    report.add_check_option(parser)
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 31)
    num_tokens = PROMPT_TOKENS // (16 if options.quick else 1)
    rows = [measure(page_size, num_tokens, rounds) for page_size in PAGE_SIZES]
    found = checks(rows)
    result = report.header(seed=SEED, rounds=rounds, quick=options.quick, provider=sha256_provider())
    report.write_json(result | {"chains": rows, "checks": report.checks_as_dicts(found)}, options.json)
    report.table(
        f"SHA-256 chain of {num_tokens:,} tokens, {sha256_provider()}",
        ("page size", "chain ms", "in a tree ms", "hashlib a page ms", "SGLang's way ms", "one digest ms", "ns a page",
         "hashlib / chain", "aim"),
        [(str(row["page_size"]),
          *(report.number(row[f"{name}_ms"]) for name in ("chain", "in_a_tree", "hashlib", "sglang", "one_digest")),
          report.number(row["ns_a_page"]), report.number(row["ratio"]),
          report.number(TARGET if row["page_size"] == TARGET_PAGE_SIZE else None)) for row in rows],
    )  # fmt: skip
    report.conclude(found, options.check)


if __name__ == "__main__":
    main()
