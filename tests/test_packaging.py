# SPDX-License-Identifier: Apache-2.0
"""The folder of symlinks, the metadata, and what an install without a clone contains."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = sorted(path for path in (ROOT / "src" / "oarlock").iterdir() if path.is_symlink())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_top_level_package_is_linked_and_every_link_leads_to_one() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {link.name for link in LINKS} == packages
    for link in LINKS:
        assert os.readlink(link) == f"../../{link.name}", "relative, so that a clone may lie anywhere"
        assert (link / "__init__.py").is_file()


def test_metadata() -> None:
    assert PROJECT["scripts"] == {"oarlock": "oarlock.cli.main:main"}
    assert (ROOT / "src" / "oarlock" / "py.typed").is_file()
    pins = {line.split("==")[0] for line in PROJECT["optional-dependencies"]["petastorm"] if "==" in line}
    assert pins == {"numpy", "petastorm", "pyarrow"}


@pytest.mark.parametrize("name", ["dev", "modern", "proto"])
def test_pins_are_hashed_and_name_no_host(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert "//" not in text
    assert "+" not in re.sub(r"#.*", "", text), "a local version is on no index"
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.match(r"[\w.-]+==[\w.]+ \\\n", entry), entry[:60]
        assert "--hash=sha256:" in entry


def test_development_pins_are_those_of_the_extra() -> None:
    text = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    for line in PROJECT["optional-dependencies"]["petastorm"]:
        if "==" in line:
            assert f"\n{line} \\\n" in f"\n{text}"


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["wheel", "sdist"])
def test_install_without_a_clone(form: str, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet")
    clone = tmp_path / "clone"
    run("git", "clone", "--quiet", ROOT, clone, cwd=tmp_path)
    if form == "wheel":
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", clone, cwd=tmp_path)
    else:
        code = "import setuptools.build_meta as backend; backend.build_sdist('../dist')"
        (tmp_path / "dist").mkdir()
        run(sys.executable, "-c", code, cwd=clone)
        [archive] = (tmp_path / "dist").iterdir()
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", archive, cwd=tmp_path)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        names = archive_of_wheel.namelist()
    sources = {
        f"oarlock/{link.name}/{path.relative_to(clone / link.name).as_posix()}"
        for link in LINKS
        for kind in ("*.py", "*.proto")
        for path in (clone / link.name).rglob(kind)
    }
    assert sources | {"oarlock/py.typed", "oarlock/__init__.py"} == {
        name for name in names if ".dist-info/" not in name and not name.endswith(".pyi")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "--quiet", "install", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    modules = [f"oarlock.{link.name}" for link in LINKS]
    code = f"import importlib; [importlib.import_module(name) for name in {modules}]"
    run(python, "-W", "error", "-c", code, cwd=tmp_path)
    assert "oarlock" in run(tmp_path / "venv" / "bin" / "oarlock", "--help", cwd=tmp_path)
