"""What installing the package promises: metadata, command, extras, and the script that makes environments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import sparsecod_megatron

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "sparsecod_megatron"
LOCKS = ("venv", "ngc", "torch")
installed = pytest.mark.skipif(
    not list(metadata.distributions(name=PACKAGE)), reason=f"{PACKAGE} is not installed here (tests/run.sh does it)"
)


@pytest.fixture(scope="module")
def pyproject(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


def installed_closure(extras: set[str]) -> set[str]:
    """Names of all distributions that installing the package with these extras brings along, as installed here."""
    closure: set[str] = set()
    pending = [(PACKAGE, frozenset(extras))]
    visited = set()
    while pending:
        name, wanted = pending.pop()
        if (name, wanted) in visited:
            continue
        visited.add((name, wanted))
        closure.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            markers = [{"extra": extra} for extra in wanted] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(marker) for marker in markers):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return closure


@installed
def test_installed_version_is_the_packages_own() -> None:
    assert metadata.version(PACKAGE) == sparsecod_megatron.__version__


@installed
def test_cpu_installs_never_bring_transformer_engine() -> None:
    closure = installed_closure({"eval", "wandb", "dev"})
    assert {"megatron-core", "torch", "lm-eval", "psutil", "pytest"} <= closure
    assert not {name for name in closure if name.startswith(("transformer-engine", "apex"))}


def test_transformer_engine_is_named_by_the_gpu_extra_alone(pyproject: dict) -> None:
    project = pyproject["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    naming = {extra for extra, requirements in lists.items() if "transformer-engine" in " ".join(requirements)}
    assert naming == {"gpu"}


def extras_installed(repo_root: Path) -> list[str]:
    line = re.search(r'^EXTRAS="(.*)"$', (repo_root / "tools" / "run_in_venv.sh").read_text("utf-8"), re.MULTILINE)
    assert line
    return line[1].split(",")


def locked(repo_root: Path, name: str) -> list[Requirement]:
    """The entries of a lock file, without their hashes."""
    lines = (repo_root / "tools" / "lock" / f"{name}.txt").read_text("utf-8").splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"[a-z0-9]", line)]


@pytest.mark.parametrize("name", ["venv", "ngc"])
def test_the_lock_has_a_version_in_range_of_all_that_is_asked_for(repo_root: Path, pyproject: dict, name: str) -> None:
    project = pyproject["project"]
    asked = map(
        Requirement,
        sum(
            (project["optional-dependencies"][extra] for extra in extras_installed(repo_root)), project["dependencies"]
        ),
    )
    pins = [*locked(repo_root, name), *locked(repo_root, "torch")]
    versions = {
        canonicalize_name(pin.name): pin.specifier for pin in pins if pin.marker is None or pin.marker.evaluate()
    }
    from_image = {"numpy", "setuptools"} if name == "ngc" else set()
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        wanted = canonicalize_name(requirement.name)
        if wanted not in from_image:
            (pin,) = versions[wanted]
            assert requirement.specifier.contains(pin.version), f"{requirement}: the lock has {pin.version}"


@installed
def test_what_is_installed_is_the_lock(repo_root: Path) -> None:
    if os.environ.get("VIRTUAL_ENV") != str(repo_root / ".venv"):
        pytest.skip("not started through tools/run_in_venv.sh, which would have installed it")
    for pin in locked(repo_root, "venv"):
        if pin.marker is None or pin.marker.evaluate():
            assert pin.specifier.contains(metadata.version(pin.name), prereleases=True), str(pin)


def test_every_folder_with_code_is_shipped(repo_root: Path, pyproject: dict) -> None:
    include = pyproject["tool"]["setuptools"]["packages"]["find"]["include"]
    shipped = {repo_root / name.replace(".", "/") for name in find_packages(str(repo_root), include=include)}
    assert {file.parent for file in (repo_root / PACKAGE).rglob("*.py")} == shipped


def test_console_script_and_module_are_one_command(pyproject: dict) -> None:
    module, function = pyproject["project"]["scripts"]["sparsecod"].split(":")
    start = f"import sys; from {module} import {function} as main; sys.exit(main(['--help']))"
    outputs = [
        subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
        for arguments in (["-c", start], ["-m", PACKAGE, "--help"])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("usage: sparsecod")


def test_ci_and_tests_start_from_any_folder(repo_root: Path) -> None:
    for script in (".ci/run", "tests/run.sh", "tools/run_in_venv.sh"):
        text = (repo_root / script).read_text(encoding="utf-8")
        assert os.access(repo_root / script, os.X_OK), f"{script} is not executable"
        assert "BASH_SOURCE" in text, f"{script} does not find the repository by its own place"


# ---------------------------------------------------------------- tools/run_in_venv.sh


def run_in_venv(repo_root: Path, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SPARSECOD_PYTHON"} | variables
    script = ["bash", str(repo_root / "tools" / "run_in_venv.sh"), *command]
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_no_command_is_a_usage_error(repo_root: Path, tmp_path: Path) -> None:
    done = run_in_venv(repo_root, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run_in_venv.sh: usage:")


def test_named_interpreter_that_is_missing_or_has_no_torch_is_one_line(repo_root: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    bare = str(tmp_path / "bare" / "bin" / "python")
    for interpreter, complaint in (("no-such-python", "no interpreter"), (bare, "has no torch")):
        done = run_in_venv(repo_root, "true", cwd=tmp_path, SPARSECOD_PYTHON=interpreter)
        assert done.returncode == 1
        assert re.fullmatch(rf"run_in_venv.sh: SPARSECOD_PYTHON: .*{complaint}.*\n", done.stderr)


@pytest.fixture
def lonely_tree(repo_root: Path, tmp_path: Path) -> Path:
    """A checkout of the script and what it installs alone, so that nothing here can touch the real .venv."""
    (tmp_path / "tree" / "tools" / "lock").mkdir(parents=True)
    for file in ("tools/run_in_venv.sh", "pyproject.toml", *(f"tools/lock/{name}.txt" for name in LOCKS)):
        (tmp_path / "tree" / file).write_bytes((repo_root / file).read_bytes())
    return tmp_path / "tree"


def test_without_a_recent_python_nothing_is_made(lonely_tree: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cksum", "cat", "flock"):
        found = next((Path(folder) / name for folder in os.get_exec_path() if (Path(folder) / name).exists()), None)
        if found:
            (tools / name).symlink_to(found)
    (tools / "python3").write_text("#!/bin/sh\ncase $1 in -V) echo Python 3.9.1;; *) exit 1;; esac\n")
    (tools / "python3").chmod(0o755)
    done = run_in_venv(lonely_tree, "true", cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 1
    assert re.fullmatch(r"run_in_venv.sh: needs Python 3.10 or newer .* python3 is 'Python 3.9.1'.*\n", done.stderr)
    assert not (lonely_tree / ".venv").exists()


def test_an_environment_that_belongs_elsewhere_is_not_cleared(lonely_tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "kept").write_text("")
    (lonely_tree / ".venv").symlink_to(other)
    done = run_in_venv(lonely_tree, "true", cwd=tmp_path)
    assert done.returncode == 1 and (other / "kept").exists()
    assert done.stderr == (
        f"run_in_venv.sh: .venv is a link to {other}, which is not this folder's environment: remove the link\n"
    )


@pytest.mark.slow
def test_failed_install_leaves_no_stamp_and_no_lock(lonely_tree: Path, tmp_path: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):  # the second call must start over, not believe the first
        done = run_in_venv(lonely_tree, "echo", "ran", cwd=tmp_path, **offline)
        assert (done.returncode, done.stdout) == (1, "")
        assert "pip could not install the packages" in done.stderr.splitlines()[-1]
        assert not list((lonely_tree / ".venv").glob("*.stamp*"))


STAND_IN_PIP = """
import pathlib, sys
shown = pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1]) if "--requirement" in sys.argv else None
print("pip:", *sys.argv[1:], shown.read_text() if shown else "", file=sys.stderr)
"""


def test_given_interpreter_keeps_what_was_compiled_and_gets_the_rest_of_the_lock(
    lonely_tree: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "image", symlinks=True)
    python = tmp_path / "image" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    for name, version in {"torch": "2.10.0a0", "transformer_engine": "2.9", "NumPy": "1.26.4"}.items():
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(STAND_IN_PIP)
    entry = "{}==1.0 \\\n    --hash=sha256:0\n"
    lock = "".join(map(entry.format, ("datasets", "numpy", "nvidia-modelopt", "transformer-engine")))
    (lonely_tree / "tools" / "lock" / "ngc.txt").write_text(lock)
    done = run_in_venv(lonely_tree, "true", cwd=tmp_path, SPARSECOD_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.split("pip:")[1:]
    assert first.endswith(" " + "".join(map(entry.format, ("datasets", "nvidia-modelopt"))) + "\n")
    assert "--editable" in second


def test_ready_environment_passes_everything_through(repo_root: Path, tmp_path: Path) -> None:
    if os.environ.get("VIRTUAL_ENV") != str(repo_root / ".venv"):
        pytest.skip("not started through tools/run_in_venv.sh, which would have finished .venv")
    command = 'printf "%s|" "$@" "$PWD" "$(command -v python3)"; cat; exit 7'
    done = run_in_venv(repo_root, "bash", "-c", command, "bash", "a b", "*", "", cwd=tmp_path)
    assert done.returncode == 7
    assert done.stdout == f"a b|*||{tmp_path}|{repo_root}/.venv/bin/python3|"
    assert done.stderr == ""
