"""The command line: ``medvdm COMMAND``, a command for each thing that is done with a run or with a file.

The options are the fields of the same dataclasses that the Python API takes. Results go to stdout, progress and
errors to stderr. An error is one line; its exit code is 2 for what the user can mend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvdm.cli.parsing import parse
from medvdm.cli.tables import audit_table, evaluation_table
from medvdm.errors import InputError, MedvdmError, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that this terminal cannot show is shown as its code
            stream.reconfigure(errors="backslashreplace")
    if argv is None:
        argv = sys.argv[1:]
        _use_huge_pages(argv)
        sys.unraisablehook = _quiet_stragglers
    try:
        code = _dispatch(list(argv))
        sys.stdout.flush()
        return code
    except MedvdmError as problem:
        _complain(problem)
        return problem.exit_code
    except BrokenPipeError:  # the reader has gone, as with `| head`; nothing more can be said to it
        sys.stdout = open(os.devnull, "w")
        return 141
    except OSError as problem:
        if problem.errno not in _PLACES:
            raise
        place = problem.filename  # a write, unlike opening a file, does not say where
        if place is None:
            place = _out_of(argv)
        _complain(f"{f'{place}: ' if place else ''}{problem.strerror}; expected a place that can be written")
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def _out_of(argv: Sequence[str]) -> str | None:
    """The value of --out or --maps, in either spelling."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--out", "--maps"):
            return value if equals else following
    return None


#: What is wrong with the place that a command should write to, rather than with the program.
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def _quiet_stragglers(problem: Any) -> None:
    """Print what nobody can catch, but not the reads of a damaged checkpoint that end after the first has failed.

    Orbax closes its event loop at the first failure; TensorStore's threads then complain about the closed loop.
    """
    if not (problem.exc_type is RuntimeError and str(problem.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(problem)


def _complain(problem: object) -> None:
    print(f"medvdm: {' '.join(str(problem).split())}", file=sys.stderr)


def _use_huge_pages(argv: Sequence[str]) -> None:
    """Start again with 2 MB pages for large arrays, where the system offers them on request.

    A training step of the `paper` preset fills hundreds of megabytes of fresh memory, and most of the time of filling
    is the system handing it out 4 kB at a time. The setting is read when a process starts, hence the second start (a
    few milliseconds; JAX is not loaded yet). An existing GLIBC_TUNABLES is left alone.
    """
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    with contextlib.suppress(OSError):
        name, version = platform.libc_ver()
        recent = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        if recent and "GLIBC_TUNABLES" not in os.environ and "[madvise]" in offered.read_text():
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, "-m", "medvdm", *argv])


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "evaluate": _evaluate,
        "sample": _sample,
        "inpaint": _inpaint,
        "audit": _audit,
        "denoise": _denoise,
        "score": _score,
        "verify": _verify,
        "export": _export,
        "benchmark": _benchmark,
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(
            "usage: medvdm {" + ",".join(commands) + "} [options]\n\nVariational diffusion models for medical images."
        )
        print(
            "  train      train a model and leave a run in a folder\n  evaluate   the bound of a run on held-out images"
        )
        print("  sample     draw synthetic images from a run\n  audit      samples of a run held against real images")
        print("  inpaint    draw the pixels of an image under a mask, given the others")
        print("  denoise    remove the noise of image files with a run on pixels")
        print("  score      what images cost a run in bits, and which are unusual")
        print("  verify     which marks files bear: synthetic or not said, and from where")
        print("  export     write a run for release, without what need not leave")
        print("  benchmark  step time against a plain JAX step")
        print("\n'medvdm COMMAND --help' lists the options of a command.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from medvdm import __version__

        print(f"medvdm {__version__}")
        return 0
    if argv[0] not in commands:
        raise InputError(f"command: '{argv[0]}'; {nearest(argv[0], commands)}")
    _start_jax()
    return commands[argv[0]](argv[1:])


def _start_jax() -> None:
    """Import JAX, which reads its settings from the environment when it is imported."""
    try:
        import jax  # noqa: F401
    except ValueError as problem:  # JAX_ENABLE_X64=maybe, for example
        raise InputError(f"environment: {problem}; expected a value that JAX takes, or the variable unset") from None


# The commands. Their options are in medvdm.cli.options; heavy modules are imported after the options are parsed.


def _train(argv: list[str]) -> int:
    from medvdm.cli import options
    from medvdm.paths import local_path
    from medvdm.runs.presets import PRESETS, preset
    from medvdm.runs.store import EVALUATIONS, holds_run, read_lines, read_record

    start, _ = parse(options.Start, argv, "train", add_help=False, return_unknown_args=True)
    if start.preset is not None and start.preset not in PRESETS:
        raise InputError(f"preset: '{start.preset}'; {nearest(start.preset, PRESETS)}")
    out = local_path(start.out, "out") if start.out else None
    if start.resume and out and holds_run(out):
        base = read_record(out)[1]  # what is not said again stays as it was
        if start.preset not in (None, base.preset):
            raise InputError(f"preset: '{start.preset}'; expected '{base.preset}', with which {start.out} was started")
    else:
        base = preset(start.preset or "demo")
    description = (
        f"Train a model and leave a run in a folder. The defaults below are those of the preset {base.preset}."
    )
    args = parse(options.Train, argv, "train", options.train_defaults(base), description=description)
    if not args.out:
        raise InputError("--out: ''; expected the folder of the run")
    config = options.run_config(args)

    from medvdm.runs.fit import fit

    first = _joined(args.processes)
    run = fit(config, args.out, resume=args.resume, progress=args.progress)
    if first:
        looks = [r for r in read_lines(run.path / EVALUATIONS) if r["step"] == run.step]
        for look in looks:
            print(f"step {run.step}, validation, {look['weights']} weights: {look['vlb_bpd']:.4f} bits per dimension")
        print(f"run: {args.out}")
    return 0


def _joined(processes: Any) -> bool:
    """Join the other processes, if there are any; whether this is the one that reports."""
    from medvdm.training.devices import first_process, start_processes

    start_processes(processes.coordinator, processes.num_processes, processes.process_id)
    return first_process()


def _evaluate(argv: list[str]) -> int:
    from medvdm.cli.options import Evaluate

    args = parse(Evaluate, argv, "evaluate")

    from medvdm.runs.evaluate import evaluate
    from medvdm.runs.run import load, load_data

    first = _joined(args.processes)
    run = load(args.run, ema=args.ema, step=args.step)
    data = None
    if (args.data, args.data_dir, args.image_size) != (None, None, None):
        data = load_data(run, args.data, args.data_dir, args.image_size)
    result = evaluate(run, data, args.evaluation)
    if first:
        print(json.dumps(result) if args.json else evaluation_table(result))
    return 0


def _sample(argv: list[str]) -> int:
    from medvdm.cli.options import Sample

    args = parse(Sample, argv, "sample")
    if (args.run is None) == (args.pretrained is None):
        found = "neither" if args.run is None else f"'{args.run}' and --pretrained {args.pretrained}"
        raise InputError(f"RUN: {found}; expected the folder of a run, or --pretrained")
    if args.pretrained and (args.ema or args.step is not None):
        raise InputError("--pretrained: has the moving average of its last step only; expected no --ema and no --step")

    from medvdm.runs import provenance
    from medvdm.runs.pretrained import pretrained
    from medvdm.runs.run import load
    from medvdm.runs.sample import sample_to

    place, suffix = provenance.place(args.out)
    first = _joined(args.processes)
    run = pretrained(args.pretrained) if args.pretrained else load(args.run, ema=args.ema, step=args.step)
    sample_to(args.out, run, config=args.drawing)
    if first:
        files = [] if suffix in (".npz", ".png") else provenance.dicom_paths(place, suffix, args.drawing.num)
        where = f"{files[0]} to {files[-1].name}" if len(files) > 1 else files[0] if files else args.out
        print(f"{args.drawing.num} synthetic images: {where}")
    return 0


def _inpaint(argv: list[str]) -> int:
    from medvdm.cli.options import Inpaint

    args = parse(Inpaint, argv, "inpaint")

    from medvdm.runs.inpaint import inpaint_file
    from medvdm.runs.run import load

    for path in inpaint_file(
        load(args.run, ema=args.ema, step=args.step), args.file, args.mask, args.out, args.filling
    ):
        print(f"partly synthetic image: {path}")
    return 0


def _audit(argv: list[str]) -> int:
    from medvdm.cli.options import Audit

    args = parse(Audit, argv, "audit")
    if args.privacy:
        return _audit_privacy(args)
    _unused(args, "samples train held_out patient_pattern image_size work", "used with --privacy only")
    _unused(args.privacy_settings, "", "used with --privacy only")
    if args.run is None:
        raise InputError("RUN: missing; expected the folder of the run")

    from medvdm.runs.audit import audit
    from medvdm.runs.run import load, load_data

    first = _joined(args.processes)
    run = load(args.run, ema=args.ema, step=args.step)
    data = None if args.data_dir is None else load_data(run, data_dir=args.data_dir)
    result = audit(run, data, args.audit)
    if first:
        print(json.dumps(result) if args.json else audit_table(result))
    return 0


def _unused(options: Any, names: str, why: str) -> None:
    """Refuse options, by default all, that differ from their defaults where they would not be heeded."""
    start = type(options)()
    for name in names.split() or [field.name for field in dataclasses.fields(options)]:
        if (value := getattr(options, name)) != getattr(start, name):
            raise InputError(f"--{name.replace('_', '-')}: {value}; {why}")


def _audit_privacy(args: Any) -> int:
    from medvdm.cli.tables import privacy_table
    from medvdm.runs.config import SampleConfig
    from medvdm.runs.privacy import audit_folders, audit_privacy, read_folders
    from medvdm.runs.run import load

    _unused(args.processes, "", "a privacy audit is one process")
    _unused(args.audit, "split", "used without --privacy only, which takes all held-out images")
    if args.run is None:
        _unused(args, "ema step data_dir", "used with a run only")
    else:
        _unused(args, "work", "used without a run only, which keeps what is finished in its folder")
    if args.run is None or args.samples is not None:
        _unused(args.audit, "", "used where samples are drawn from the run only")
    if args.train is None and args.held_out is None:
        _unused(args, "patient_pattern", "used with --train and --held-out only")
    run = None if args.run is None else load(args.run, ema=args.ema, step=args.step)
    size = args.image_size
    if run is not None:
        height, width, _ = run.config.model.image_shape
        if size not in (None, height) or (height != width and (args.samples or args.train or args.held_out)):
            raise InputError(f"--image-size: {size}; expected that of the run's images, {height}x{width}")
        size = height if height == width else None
    folders = read_folders(
        args.samples, args.train, args.held_out, patient_pattern=args.patient_pattern, image_size=size
    )
    if run is None:
        result = audit_folders(folders, args.privacy_settings, work=args.work)
    else:
        names = [f.name for f in dataclasses.fields(SampleConfig)]
        sampling = SampleConfig(**{name: getattr(args.audit, name) for name in names})
        result = audit_privacy(run, None, args.privacy_settings, sampling, data_dir=args.data_dir, folders=folders)
    print(json.dumps(result) if args.json else privacy_table(result))
    return 0


def _denoise(argv: list[str]) -> int:
    from medvdm.cli.options import Denoise

    args = parse(Denoise, argv, "denoise")

    from medvdm.runs.denoise import Result, denoise_files
    from medvdm.runs.run import load

    def say(result: Result) -> None:
        if result.error is not None:
            _complain(result.error)
            return
        print(f"{result.file}: {', '.join(map(str, reversed(result.written)))}")
        for note in result.notes:
            print(f"note: {result.file}: {note}", file=sys.stderr)

    run = load(args.run, ema=args.ema, step=args.step)
    results = denoise_files(run, args.files, args.out, args.denoising, done=say)
    return 1 if any(result.error for result in results) else 0


def _score(argv: list[str]) -> int:
    from medvdm.cli.options import Score

    args = parse(Score, argv, "score")

    from medvdm.cli.tables import score_table
    from medvdm.runs.run import load, load_data
    from medvdm.runs.score import score_files

    run = load(args.run, ema=args.ema, step=args.step)
    data = None if args.data_dir is None else load_data(run, data_dir=args.data_dir)
    result = score_files(run, args.files, args.score, maps=args.maps, data=data, window=args.window)
    for one in result["failed"]:
        _complain(one["problem"])
    if args.json:
        print(json.dumps(result))
    elif result["images"]:
        print(score_table(result))
    return 1 if result["failed"] else 0


def _verify(argv: list[str]) -> int:
    from medvdm.cli.options import Verify

    args = parse(Verify, argv, "verify")
    if not args.files:
        raise InputError("FILE: none given; expected at least one file (see medvdm verify --help)")

    from medvdm.cli.tables import marks_table
    from medvdm.runs.marks import CAUTION, marks

    found, failed = [], []
    for file in args.files:
        try:
            found.append(marks(file).to_json())
        except MedvdmError as problem:
            _complain(problem)
            failed.append({"file": file, "problem": str(problem)})
    if args.json:
        print(json.dumps({"files": found, "failed": failed, "caution": CAUTION}))
    elif found:
        print(marks_table(found, CAUTION))
    return 1 if failed else 0


def _export(argv: list[str]) -> int:
    from medvdm.cli.options import Export

    args = parse(Export, argv, "export")

    from medvdm.runs.export import export

    exported = export(args.run, args.out, ema=args.ema, step=args.step)
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"step {exported.step}, {exported.weights} weights, for release: {args.out}")
    return 0


def _benchmark(argv: list[str]) -> int:
    from medvdm.cli.options import Benchmark
    from medvdm.runs import config as config_
    from medvdm.runs.presets import preset

    args = parse(Benchmark, argv, "benchmark")
    config = preset(args.preset, batch_size=args.batch_size)
    if args.image_size is not None:
        config = config_.change(config, image_size=args.image_size)

    from medvdm.cli.tables import benchmark_table
    from medvdm.cost import benchmark
    from medvdm.training.devices import available

    available()  # refuses a platform that is not here
    result = benchmark.run(config, args.timing)
    print(json.dumps(result) if args.json else benchmark_table(result))
    return 0
