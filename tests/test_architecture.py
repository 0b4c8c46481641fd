# SPDX-License-Identifier: Apache-2.0
"""The layers and gates of the design, held as data and read off the sources: no package is imported here."""

import ast
import hashlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Arrows go down only: packages of one layer do not import each other.
LAYERS = {
    "cli": 5,
    "launch": 4,
    "recipes": 4,
    "export": 4,
    "ps": 3,
    "cluster": 3,
    "worker": 3,
    "serving": 3,
    "client": 2,
    "checkpoint": 2,
    "nn": 2,
    "data": 2,
    "embedding": 1,
    "proto": 0,
    "telemetry": 0,
}
# Beside the layers: it may import everything and nothing imports it.
OUTSIDE = {"benchmarks", "simulation"}
# Third party -> the only packages or files that may import it.
GATES = {
    "numba": ("embedding/", "nn/", "data/"),
    "llvmlite": ("embedding/",),
    "grpc": ("proto/rpc/",),
    "petastorm": ("data/petastorm_reader.py",),
    "faiss": ("serving/nearest.py",),
    "onnx": ("export/onnx.py",),
    "torch": ("benchmarks/",),
    "ray": (),
    "kubernetes": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
}
COMPILERS = {"njit", "vectorize", "guvectorize", "cfunc", "stencil", "jit_module"}
MAX_LINES = 400
NAMES_OF_NOTHING = {"util", "utils", "common", "helper", "helpers", "misc", "shared", "tools"}

PACKAGES = sorted(path.name for path in (ROOT / "src" / "oarlock").iterdir() if path.is_symlink())
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if "_pb2" not in path.name)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import; ``from a import b`` counts as ``a.b``, for b may be a module."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def found(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_package_has_a_layer() -> None:
    assert set(PACKAGES) <= LAYERS.keys() | OUTSIDE, "give the new package its layer"


def test_arrows_go_down_only() -> None:
    problems = []
    for path in SOURCES:
        mine = path.relative_to(ROOT).parts[0]
        for line, name in imports(path):
            parts = name.split(".")
            where = f"{relative(path)}:{line} imports {name}"
            if name.startswith("."):
                problems.append(f"{where}: write the import in full")
            elif parts[0] in LAYERS or parts[0] in OUTSIDE:
                problems.append(f"{where}: write oarlock.{name}")
            elif parts[0] == "oarlock" and mine not in OUTSIDE and len(parts) > 1 and parts[1] != mine:
                theirs = LAYERS.get(parts[1], -1 if parts[1] == "__version__" else 99)
                if theirs >= LAYERS[mine]:
                    problems.append(f"{where}: layer {LAYERS[mine]} may not import layer {theirs}")
    found(problems)


def test_third_parties_stay_behind_their_gates() -> None:
    problems = []
    for path in SOURCES:
        for line, name in imports(path):
            allowed = GATES.get(name.split(".")[0])
            if allowed is not None and not relative(path).startswith(allowed):
                problems.append(f"{relative(path)}:{line} imports {name}: only {', '.join(allowed) or 'no file'} may")
    found(problems)


def test_every_third_party_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^\w-]", line)[0] for line in lines}
    known = {*declared, *sys.stdlib_module_names, "oarlock", "grpc", "google", "faiss"}
    found(
        [
            f"{relative(path)}:{line} imports {name}, which pyproject.toml does not declare"
            for path in SOURCES
            for line, name in imports(path)
            if not name.startswith(".") and name.split(".")[0] not in known
        ]
    )


def test_tests_import_the_package_by_its_name() -> None:
    problems = [
        f"{relative(path)}:{line} imports {name}: write oarlock.{name}"
        for path in TESTS
        for line, name in imports(path)
        if name.split(".")[0] in LAYERS.keys() | OUTSIDE
    ]
    found(problems)


def test_kernels_have_one_decorator() -> None:
    problems = []
    for path in SOURCES:
        if relative(path) == "embedding/jit.py":
            continue
        for node in ast.walk(parse(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            owned = isinstance(node, ast.ImportFrom) and node.module == "oarlock.embedding.jit"
            numba_jit = name == "jit" and isinstance(node, ast.Attribute)
            if name in COMPILERS or COMPILERS & set(imported) or ("jit" in imported and not owned) or numba_jit:
                problems.append(f"{relative(path)}:{node.lineno}: use oarlock.embedding.jit.jit")
    found(problems)


def test_no_bare_except() -> None:
    problems = []
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                problems.append(f"{relative(path)}:{node.lineno}: name what is caught")
    found(problems)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_form_of_a_file(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path.stem not in NAMES_OF_NOTHING, "name the file after its one concept"
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines: which are the two concepts?"
    if path.name != "__init__.py" or lines:
        assert lines[:1] == ["# SPDX-License-Identifier: Apache-2.0"], "the first line names the licence"
        header = ast.get_docstring(parse(path))
        assert header or path in TESTS, "the header says what it is, its invariant, who may call it"


def test_generated_code_is_fresh() -> None:
    recorded = ROOT / "proto" / "generated.sha256"
    names = {path.name for kind in ("*.proto", "*_pb2.py", "*_pb2.pyi") for path in (ROOT / "proto").glob(kind)}
    if not names:
        pytest.skip("no message is defined yet")
    expected = dict(reversed(line.split()) for line in recorded.read_text(encoding="utf-8").splitlines())
    actual = {name: hashlib.sha256((ROOT / "proto" / name).read_bytes()).hexdigest() for name in names}
    assert actual == expected, "run `make proto`"
