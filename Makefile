# SPDX-License-Identifier: Apache-2.0
# `make` shows the targets. Every environment is a folder of this checkout; nothing is installed elsewhere, but for
# Debian's package of ensurepip where it is missing. Another interpreter: make PYTHON=/path/to/python3.11
PYTHON ?= python3.11
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-modern test-torch test-slow test-networks setup-torch check proto bench pins clean
# Nothing of the caller's Python environment leaks into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
EDITABLE := -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
COMPILE := .venv-pins/bin/uv pip compile --python-version 3.11 --generate-hashes --no-header --no-annotate --no-config --upgrade --quiet

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# Made again whenever the pins or the package's metadata change.
.venv/ready: requirements/dev.txt requirements/venv.sh pyproject.toml src/oarlock/__init__.py
	requirements/venv.sh .venv requirements/dev.txt $(PYTHON)
	.venv/bin/python $(EDITABLE)
	touch $@

.venv-modern/ready: requirements/modern.txt requirements/venv.sh pyproject.toml src/oarlock/__init__.py
	requirements/venv.sh .venv-modern requirements/modern.txt $(PYTHON)
	.venv-modern/bin/python $(EDITABLE)
	touch $@

# PyTorch is not pinned by hash: which build fits (CPU or a CUDA version, often from an index of its own) is the machine's
# business, and only the comparisons want it.
.venv/torch: .venv/ready
	.venv/bin/python -m pip --disable-pip-version-check --quiet install torch==2.13.0
	touch $@

.venv-proto/ready: requirements/proto.txt requirements/venv.sh
	requirements/venv.sh .venv-proto requirements/proto.txt $(PYTHON)
	touch $@

setup: .venv/ready  ## make .venv with everything in it

demo: setup  ## train on generated data: coordinator, two shards, two workers
	.venv/bin/oarlock demo

# Those that start processes of their own wait for them most of the time, and take as long as all others: both at once.
WITH_PROCESSES := $(addprefix tests/,benchmarks checkpoint cli client cluster data docs embedding export hostile launch)
OTHERS = $(filter-out $(WITH_PROCESSES),$(patsubst %/,%,$(wildcard tests/[a-z]*/)) $(wildcard tests/test_*.py))

test: setup  ## all fast tests, by two processes; the output of the second one comes last
	@told=$$(mktemp) && trap 'rm -f $$told; kill $$second 2>/dev/null' EXIT && \
	{ .venv/bin/pytest $(OTHERS) >$$told 2>&1 & } && second=$$! && \
	{ .venv/bin/pytest $(WITH_PROCESSES); first=$$?; } && \
	{ wait $$second; last=$$?; } ; cat $$told && exit $$((first | last))

test-modern: .venv-modern/ready  ## the same tests with the newest numpy and pyarrow, without Petastorm
	.venv-modern/bin/pytest

setup-torch: .venv/torch  ## add PyTorch to .venv

test-torch: setup-torch  ## the comparisons with PyTorch
	.venv/bin/pytest -m "torch and not slow"

test-slow: setup-torch  ## real processes, kills, installs from a wheel, PyTorch
	.venv/bin/pytest -m "slow or torch"

test-networks: setup  ## hosts whose links are cut, slow or lossy; root on Linux
	.venv/bin/pytest -m slow tests/chaos/test_network_hosts.py tests/chaos/test_networks.py

check: setup  ## ruff and mypy --strict
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The digests let a test see that the checked-in code belongs to the checked-in messages. Those of the Open Inference Protocol go into
# a pool of their own: in the default one a program could not have another client of the protocol beside them.
proto: .venv-proto/ready  ## generate the code of proto/*.proto
	.venv-proto/bin/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/oarlock/proto/*.proto
	sed -i 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' proto/inference_pb2.py
	cd proto && sha256sum *.proto *_pb2.py *_pb2.pyi > generated.sha256

bench: setup  ## measure, with ratios to the machine and to what else one could use
	.venv/bin/python -P -m oarlock.benchmarks

# Petastorm's declared dependency on PySpark (half a gigabyte) is not needed to read plain Parquet, so it is left out here.
pins: requirements/overrides.txt  ## choose the newest versions that fit and write their hashes
	$(PYTHON) -m venv .venv-pins && .venv-pins/bin/pip --quiet install uv
	$(COMPILE) pyproject.toml requirements/build.in --extra dev --extra onnx --extra petastorm --extra recall --override $< --no-emit-package pyspark --no-emit-package py4j -o requirements/dev.txt
	$(COMPILE) pyproject.toml requirements/build.in --extra dev --extra onnx --extra recall -o requirements/modern.txt
	$(COMPILE) requirements/proto.in -o requirements/proto.txt

clean:  ## remove the environments and all that was built
	rm -rf .venv .venv-* build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
