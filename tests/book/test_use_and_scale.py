"""The pages of the part 'Use': every script on them is parsed, every test that they name is there."""

import ast
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
sys.path[:0] = [str(BOOK / "_tools"), str(BOOK / "experiments")]

import record  # noqa: E402

from medvdm.cli import main, options  # noqa: E402
from medvdm.errors import InputError  # noqa: E402
from medvdm.runs.config import RunConfig  # noqa: E402

PAGE = (BOOK / "text" / "scale.md").read_text("utf8")
COMMANDS = {"evaluate": options.Evaluate, "sample": options.Sample, "audit": options.Audit}
PROCESSES = {"coordinator": None, "num_processes": 1, "process_id": 0}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


SHELL = blocks("sh")
SLURM = next(block for block in SHELL if block.startswith("#!"))
SERVICE, JOB = yaml.safe_load_all(blocks("yaml")[0])
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def medvdm_lines(script):
    """The words of every `medvdm` line of a script, as the shell hands them over; variables stay as they are."""
    found = []
    for line in re.sub(r"\\\n\s*", "", script).splitlines():
        if remote := re.search(r'--command="(.*)"', line):
            line = remote[1]
        words = [word for word in shlex.split(line) if word != "$RESUME"]
        if "medvdm" in words:
            found.append(words[words.index("medvdm") :])
    return found


def processes_of(words):
    """The words without those that say which processes work together, and what these say."""
    rest, said = [], dict(PROCESSES)
    pairs = iter(words)
    for word in pairs:
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in said:
            said[name] = type(PROCESSES[name] if PROCESSES[name] is not None else "")(next(pairs))
        else:
            rest.append(word)
    return rest, said


def parsed(words):
    """What the command line makes of a line: a run's settings, or the options of another command."""
    _, command, *rest = words
    if command == "train":
        preset = rest[rest.index("--preset") + 1]
        defaults = options.train_defaults(record.presets.preset(preset))
        return main.parse(options.Train, rest, "train", defaults)
    return main.parse(COMMANDS[command], rest, command)


def coordinated(args):
    """The options of a command that say which processes work together."""
    holder = getattr(args, "processes", args)
    return {name: getattr(holder, name) for name in PROCESSES}


# --- Scripts -----------------------------------------------------------------------------------------------------


def test_every_script_has_the_syntax_of_a_shell():
    for script in [*SHELL, CONTAINER["args"][0]]:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0 and done.stderr == "", (script, done.stderr)
    done = subprocess.run(["bash", "-n"], input="if [ -e x ]; do", text=True, capture_output=True)
    assert done.returncode != 0  # the check can fail


LINES = [words for script in [*SHELL, CONTAINER["args"][0]] for words in medvdm_lines(script)]


def test_all_lines_are_found():
    mentioned = sum(len(re.findall(r"\bmedvdm (?:train|evaluate|sample|audit) ", block)) for block in SHELL)
    mentioned += len(re.findall(r"\bmedvdm train ", CONTAINER["args"][0]))
    assert len(LINES) == mentioned >= 8


@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words[:3]))
def test_the_command_line_takes_every_line(words):
    index = "0" if "$JOB_COMPLETION_INDEX" in words else None
    args = parsed([index if word == "$JOB_COMPLETION_INDEX" else word for word in words])
    if words[1] == "train":
        config = options.run_config(args)
        assert isinstance(config, RunConfig) and config.data.data == "nih" and args.out
    else:
        assert args.run
    _, said = processes_of([index if word == "$JOB_COMPLETION_INDEX" else word for word in words])
    assert coordinated(args) == said


def test_a_line_with_an_option_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="--nodes"):
        parsed(shlex.split("medvdm train --preset paper --nodes 4 --out RUN"))


def sbatch():
    """The #SBATCH lines by name; Slurm reads them only before the first command."""
    lines = SLURM.splitlines()
    assert lines[0].startswith("#!/bin/bash")
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])
    return dict((line.removeprefix("#SBATCH --") + "=").split("=")[:2] for line in lines if line.startswith("#SBATCH"))


def test_the_slurm_job_starts_one_process_per_node_and_its_batch_divides():
    asked = sbatch()
    assert asked["ntasks-per-node"] == "1"  # 'auto' gives each task all GPUs that it sees
    devices = int(asked["nodes"]) * int(asked["gpus-per-node"])
    lines = medvdm_lines(SLURM)
    assert [words[1] for words in lines] == ["train", "evaluate", "sample"]
    assert SLURM.count("\nsrun medvdm ") == len(lines)
    assert all(processes_of(words)[1]["coordinator"] == "auto" for words in lines)
    assert parsed(lines[0]).training.batch_size % devices == 0
    assert re.fullmatch(r"TERM@\d+", asked["signal"]) and "requeue" in asked
    assert re.fullmatch(r"\d+:\d\d:\d\d", asked["time"])


def test_the_slurm_job_resumes_where_there_is_a_run(tmp_path):
    """Run by bash, with programs of the same names that print what they are given."""
    for name in ("srun",):
        (tmp_path / name).write_text('#!/bin/bash\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SCRATCH": str(tmp_path)}

    def first_line():
        done = subprocess.run(["bash"], input=SLURM, env=env, text=True, capture_output=True, check=True)
        return done.stdout.splitlines()[0]

    assert "--resume" not in first_line()
    (tmp_path / "runs" / "nih").mkdir(parents=True)
    (tmp_path / "runs" / "nih" / "config.json").touch()
    assert first_line().endswith("--coordinator auto --resume")


def test_the_kubernetes_job_is_indexed_and_its_numbers_agree():
    spec = JOB["spec"]
    assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job") and spec["completionMode"] == "Indexed"
    (words,) = medvdm_lines(CONTAINER["args"][0].replace("exec ", "\n"))
    assert words[words.index("--process-id") + 1] == "$JOB_COMPLETION_INDEX"
    args = parsed(["0" if word == "$JOB_COMPLETION_INDEX" else word for word in words])
    said = coordinated(args)
    assert spec["completions"] == spec["parallelism"] == said["num_processes"]
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert args.training.batch_size % (gpus * said["num_processes"]) == 0
    assert POD["restartPolicy"] in ("Never", "OnFailure")  # what a Job allows
    assert CONTAINER["command"] == ["/bin/sh", "-c"]


def test_pod_0_has_the_name_that_the_others_ask_for():
    """NAME-0.SUBDOMAIN: a headless service of that name, which selects the job's pods before all are ready."""
    assert (SERVICE["apiVersion"], SERVICE["kind"], SERVICE["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert SERVICE["metadata"]["name"] == POD["subdomain"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    host, port = re.search(r"--coordinator (\S+):(\d+)", CONTAINER["args"][0]).groups()
    assert host == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert (
        [int(port)] == [p["containerPort"] for p in CONTAINER["ports"]] == [p["port"] for p in SERVICE["spec"]["ports"]]
    )


def test_what_the_pods_share_is_mounted_where_they_write():
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    for option in ("--out", "--data-dir"):
        assert re.search(rf"{option} (\S+)", CONTAINER["args"][0])[1].startswith(f"{mounts['shared']}/")


def test_the_job_resumes_where_there_is_a_run(tmp_path):
    (tmp_path / "medvdm").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "medvdm").chmod(0o755)
    run = tmp_path / "shared" / "runs" / "nih"
    script = CONTAINER["args"][0].replace("/shared/", f"{tmp_path}/shared/")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "3"}

    def said():
        return subprocess.run(["/bin/sh", "-c", script], env=env, text=True, capture_output=True, check=True).stdout

    assert said().rstrip().endswith("--process-id 3 --no-progress")
    run.mkdir(parents=True)
    (run / "config.json").touch()
    assert said().rstrip().endswith("--process-id 3 --no-progress --resume")


# --- What the pages say ------------------------------------------------------------------------------------------


def test_every_test_that_the_page_names_is_there():
    """Each name stands in the file that its row names."""
    rows = re.findall(r"`(tests/[\w/]+\.py)`(?:: (.*))?", PAGE)
    named = 0
    for file, names in rows:
        tree = ast.parse((ROOT / file).read_text("utf8"))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for name in re.findall(r"`(test_\w+)`", names):
            assert name in there, f"{file}: {name}"
            named += 1
    assert named >= 5


def test_equations_are_numbered_in_order_and_references_exist():
    tags = re.findall(r"\\tag\{(S\.\d+)\}", PAGE)
    assert tags == [f"S.{i + 1}" for i in range(len(tags))] and f"(S.1) to ({tags[-1]})" in PAGE
    assert set(re.findall(r"\((S\.\d+)\)", PAGE)) <= set(tags)


def test_the_record_has_every_part_that_the_experiment_measures():
    import scale

    found = json.loads((BOOK / "results" / "scale.json").read_text("utf8"))["results"]
    for kind, row in scale.rows(tiny=False):
        assert any(row.items() <= one.items() and one["load"] >= 0 for one in found[kind]), (kind, row)
    few, many = found["files"]
    assert 0 < few["fit_seconds"] < many["fit_seconds"] and few["growth_mb"] < many["growth_mb"]


def test_the_files_of_the_experiment_are_all_different(tmp_path):
    """A set with copies would be read, compared and split in another way."""
    import scale

    paths = scale.write_images(tmp_path, 70, 16)
    assert len({path.read_bytes() for path in paths}) == len(paths) == 70


@pytest.mark.parametrize("page", ["use", "scale"])
def test_every_library_name_in_code_spans_exists(page):
    """`medvdm.x.y` in the text can be found by importing `medvdm.x`."""
    text = re.sub(r"```.*?```", "", (BOOK / "text" / f"{page}.md").read_text("utf8"), flags=re.DOTALL)
    found = set(re.findall(r"`(medvdm(?:\.\w+)+)", text))
    assert found
    for name in found:
        pydoc.resolve(name)  # raises ImportError


def test_the_example_of_from_arrays_in_the_readme_runs():
    import numpy as np

    import medvdm

    readme = (ROOT / "README.md").read_text("utf8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "from_arrays" in block]
    example = example.split("run = ")[0]
    scope = {"medvdm": medvdm, "np": np, "images": np.zeros((4, 8, 8), np.uint8)}
    exec(example, scope)
    assert len(scope["data"]) == 4 and scope["data"].class_names == ("Effusion", "Normal")
