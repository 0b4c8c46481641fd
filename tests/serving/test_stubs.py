# SPDX-License-Identifier: Apache-2.0
"""Code for other languages, made of the .proto files by protoc as a user would: every message of serving, and its services."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.proto import inference_pb2, serving_pb2

ROOT = Path(__file__).resolve().parents[2]
FILES = ("common", "serving", "inference")
# protoc writes services itself only where a file asks for them; plugins of gRPC do without.
OPTION = {"java": "option java_generic_services = true;", "cpp": "option cc_generic_services = true;"}


@pytest.fixture(params=["java", "cpp", "csharp"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Return a language, and all that protoc made for it."""
    protoc = shutil.which("protoc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if protoc is None:
        pytest.skip("there is no protoc")
    language: str = request.param
    source, out = tmp_path / "oarlock" / "proto", tmp_path / "out"
    source.mkdir(parents=True)
    out.mkdir()
    for name in FILES:
        text = (ROOT / "proto" / f"{name}.proto").read_text(encoding="utf-8")
        text = text.replace('syntax = "proto3";', f'syntax = "proto3";\n{OPTION.get(language, "")}')
        (source / f"{name}.proto").write_text(text, encoding="utf-8")
    named = [f"{source}/{name}.proto" for name in FILES]
    subprocess.run([protoc, f"-I{tmp_path}", f"--{language}_out={out}", *named], check=True, timeout=60)
    files = [path for path in out.rglob("*") if path.is_file()]
    return language, "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_there_is_a_class_for_every_message_and_service(made: tuple[str, str]) -> None:
    language, text = made
    for file in (serving_pb2, inference_pb2):
        for name in file.DESCRIPTOR.message_types_by_name:
            assert re.search(rf"\bclass {name}\b", text), name
        if language not in OPTION:
            continue
        for name, service in file.DESCRIPTOR.services_by_name.items():
            found = re.search(rf"\bclass {name}\b.*", text, re.DOTALL)
            assert found, name
            for method in service.methods:
                called = method.name if language == "cpp" else method.name[0].lower() + method.name[1:]
                assert re.search(rf"\b{called}\(", found[0]), method.full_name


def test_the_services_are_the_methods_that_are_answered() -> None:
    from oarlock.proto.methods import INFERENCE, METHODS

    for name, file in (("Serving", serving_pb2), (INFERENCE, inference_pb2)):
        (service,) = file.DESCRIPTOR.services_by_name.values()
        mine = {
            m.name.split(".")[1]: (m.request.DESCRIPTOR, m.reply.DESCRIPTOR)
            for m in METHODS.values()
            if m.service == name
        }
        assert {m.name: (m.input_type, m.output_type) for m in service.methods} == mine
        assert all(METHODS[f"{name}.{m}"].path == f"/{service.full_name}/{m}" for m in mine)
