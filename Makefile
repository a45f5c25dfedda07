# `make demo` and `make test` are all that a newcomer needs; both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := 2.13.0
BUF := @bufbuild/buf@1.75.0
# How many tests run at the same time: one more than there are cores, at most 4, as some tests wait most of their time. Each
# takes up to 2 GiB of memory with its servers.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) + 1))")
# What `make quick` tests: folders, files, or single tests.
TESTS ?= tests/test_architecture.py tests/wire

# The environment that a package is built in is pinned, too.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests share the cores: a thread of torch that waits for another must not keep one busy meanwhile.
test quick interpret compat: export OMP_WAIT_POLICY := passive
# What the oldest Numba has compiled is of no use to the newest, and would replace its files.
compat: export NUMBA_CACHE_DIR := $(CURDIR)/.venv-oldest/numba
# Some images set it. Then each of the many processes of the tests would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo joint-demo joint-study quick test interpret check lint types proto-check docs-check deploy-check docs proto compat trainers image-check sbom audit pin-images gpu gpu-packages bench bench-remote bench-joint faults figures constraints clean

help:
	@echo "make demo         train a segmentation network on a loss server of its own, and draw the result"
	@echo "make joint-demo   train on 2 and 4 ranks with their joint loss, and compare with one process (three minutes)"
	@echo "make joint-study  train with the joint loss and with each rank's own loss on five seeds, and compare the networks"
	@echo "                  (ten minutes on two cores)"
	@echo "make quick        lint, and run the tests of one folder: make quick TESTS=tests/server (30 seconds)"
	@echo "make test         run the whole test suite (seven minutes on two cores; JOBS=2 runs two tests at a time)"
	@echo "make interpret    run the GPU kernels' tests on the CPU, in Triton's interpreter (installs Triton: 1 GB)"
	@echo "make check        lint, types, generated stubs, pages and dashboards, alerts, Dockerfile, Compose file, manifests, Envoy"
	@echo "make compat       run the tests that depend on them on the oldest grpcio, protobuf, NumPy and Numba"
	@echo "make trainers     run the code of docs/trainers.md in the frameworks that it names (installs them: 3 GB; five minutes)"
	@echo "make image-check  build the CPU image on a stand-in for its base, and run docker-compose.yml with it: no Docker, but"
	@echo "                  root, Linux, buildah and podman (it says what to install; about five minutes)"
	@echo "make sbom         write the components of a server: out/sbom.json (CycloneDX) and out/licences.md"
	@echo "make pin-images   pin the images of Dockerfile and docker-compose.yml by digests (needs Docker and the registries)"
	@echo "make audit        look for known vulnerabilities of the pinned versions (needs pypi.org itself, not a mirror)"
	@echo "make bench        time the core against its peers on this machine (20 minutes)"
	@echo "make bench-remote time the remote call against its peers (six minutes; installs Triton Inference Server: 1.3 GB)"
	@echo "make faults       long attacks on a server, MINUTES=5 each: fuzz, soak, overload, SIGSTOP, packet loss (30 minutes)"
	@echo "make bench-joint  time a joint step against one request of all its tensors, and in a process group (five minutes)"
	@echo "make gpu          benchmark and tests on a GPU from a bare checkout: no install, but torch, pytest,"
	@echo "                  pytest-timeout and hypothesis have to be there; for what it does with a server, also grpcio,"
	@echo "                  protobuf and cuda-bindings"
	@echo "make gpu-packages put the server's other packages, pure Python, into .gpu-packages, for make gpu on such a machine"
	@echo "make proto        generate the stubs from the .proto file"
	@echo "make docs         write the reference pages and the dashboards"
	@echo "make figures      draw the figures of the docs"
	@echo "make constraints  pin all versions to the newest"
	@echo "make clean        remove what the other targets made"

$(INSTALLED): pyproject.toml constraints.txt proto/lovasz/version.py
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); torch alone is some 200 MB, and gigabytes where it comes with CUDA ..."
	$(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/segment_digits.py

joint-demo: $(INSTALLED)
	$(BIN)/python examples/compare_ddp.py --plot out

joint-study: $(INSTALLED)
	$(BIN)/python examples/joint_study.py --json out/joint_study.json --plot out

SIDE_BY_SIDE := -m "not alone" -n $(JOBS) --dist worksteal

quick: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(call compiled,$(BIN))
	$(BIN)/python -m pytest --exitfirst $(SIDE_BY_SIDE) $(TESTS)

# Compiles what most tests need. Else their processes would compile it all at once, for longer than a test may take.
define compiled
echo "Compiling for the tests (a minute or two the first time) ..."; \
$(1)/python -c "import torch; from lovasz.core import dispatch; dispatch.warm_up(torch.device('cpu'))"
endef

# What needs most of the machine runs when the rest has ended.
test: $(INSTALLED)
	@$(call compiled,$(BIN))
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m alone tests/end_to_end

# A process of its own: Triton reads the variable when it is imported. Of the slow tests of batches, the strictest; the
# ways of ranking that a batch's size decides on by itself, where accuracy and values are tested.
INTERPRETED := (cpu-triton and not buckets and not tables and (not test_batch.py or test_strangers_change_no_bit)) \
	or ((cpu-triton-buckets or cpu-triton-tables) and (test_accuracy.py or test_compute_gives_the_vectors)) or test_triton_program.py or test_triton_graphs.py or test_triton_compiles.py
interpret: .venv-interpreter/.installed
	TRITON_INTERPRET=1 .venv-interpreter/bin/python -m pytest tests/core $(SIDE_BY_SIDE) -k "$(INTERPRETED)"

check: lint types proto-check docs-check deploy-check

docs-check: $(INSTALLED)
	$(BIN)/python -m docs.generated --check

docs: $(INSTALLED)
	$(BIN)/python -m docs.generated

deploy-check: $(INSTALLED) .venv-deploy/.installed
	@$(BIN)/python deploy/image_check.py --quick
	@if test -x .venv-deploy/bin/python; then .venv-deploy/bin/python deploy/kubernetes_check.py; \
	else echo "Kubernetes: not checked, as .venv-deploy could not be made"; fi
	@if command -v promtool >/dev/null; then \
		promtool check rules deploy/prometheus/alerts.yml && promtool test rules deploy/prometheus/alerts_test.yml; \
	else echo "alerts: not tested, as promtool is not here (Debian: apt-get install prometheus)"; fi

# Tools of the checks; where there are none for the platform, the checks use what is installed, or skip.
.venv-deploy/.installed: deploy/requirements.txt
	@test -x .venv-deploy/bin/pip || $(PYTHON) -m venv .venv-deploy
	@if PIP_CONSTRAINT= .venv-deploy/bin/python -m pip install --quiet --requirement deploy/requirements.txt; \
	then touch $@; else echo "the tools of deploy/requirements.txt could not be installed into .venv-deploy"; fi

image-check: $(INSTALLED) .venv-deploy/.installed
	$(BIN)/python deploy/image_check.py

.venv-sbom/.installed: deploy/sbom.txt
	@test -x .venv-sbom/bin/pip || $(PYTHON) -m venv .venv-sbom
	PIP_CONSTRAINT= .venv-sbom/bin/python -m pip install --quiet --requirement deploy/sbom.txt
	@touch $@

sbom: $(INSTALLED) .venv-sbom/.installed
	.venv-sbom/bin/python deploy/sbom.py $(BIN)/python out

pin-images:
	$(PYTHON) deploy/pin_images.py

# --strict: a package that could not be looked up is a failure, not a pass.
audit: .venv-sbom/.installed
	PIP_CONSTRAINT= .venv-sbom/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(call with_buf,lint)

# Runs a command of buf on the contract. Skips it where npx, or the registry that npx takes buf from, cannot be reached.
define with_buf
if command -v npx >/dev/null && npx --yes $(BUF) --version >/dev/null 2>&1; \
then cd proto && npx --yes $(BUF) $(1) && echo "buf $(firstword $(1)): no complaint"; \
else echo "buf $(firstword $(1)): skipped, as npx (Node.js) is not here or cannot download buf"; fi
endef

types: $(INSTALLED)
	$(BIN)/mypy proto core client server examples benchmarks docs deploy/grafana deploy/kubernetes
	MYPYPATH=tests:deploy $(BIN)/mypy deploy/image_check.py deploy/compose_check.py deploy/kubernetes_check.py deploy/sbom.py deploy/pin_images.py

# The stubs are made by the oldest grpcio-tools whose output the oldest admitted protobuf can run.
.venv-proto/.installed: proto/requirements.txt
	@test -x .venv-proto/bin/pip || $(PYTHON) -m venv .venv-proto
	PIP_CONSTRAINT= .venv-proto/bin/python -m pip install --quiet --requirement proto/requirements.txt
	@touch $@

proto: .venv-proto/.installed
	cd proto && ../.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		lovasz/v1/loss.proto

proto-check: .venv-proto/.installed
	@rm -rf out/stubs && mkdir -p out/stubs
	cd proto && ../.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=../out/stubs --pyi_out=../out/stubs \
		--grpc_python_out=../out/stubs lovasz/v1/loss.proto
	@for stub in loss_pb2.py loss_pb2.pyi loss_pb2_grpc.py; do \
		diff -u proto/lovasz/v1/$$stub out/stubs/lovasz/v1/$$stub || { echo "stale stubs: run make proto"; exit 1; }; done
	@echo "stubs: as generated"
	@$(call with_buf,breaking --against ../tests/wire/released)

# Versions that lie over those of .venv, so that nothing large is installed twice.
.venv-oldest/.installed .venv-interpreter/.installed .venv-trainers/.installed: .venv-%/.installed: tests/%.txt $(INSTALLED)
	@rm -rf .venv-$*
	$(BIN)/python -m venv .venv-$*
	PIP_CONSTRAINT= .venv-$*/bin/python -m pip install --quiet --no-deps --requirement $<
	@site() { "$$1"/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }; \
		echo "import site; site.addsitedir('$$(site "$(CURDIR)/$(VENV)")')" > "$$(site .venv-$*)/newest.pth"
	@touch $@

# NVIDIA's Triton Inference Server, a peer in the benchmark of the remote call: over a gigabyte, and another NumPy.
.venv-inference-server/.installed: benchmarks/remote/inference_server.txt benchmarks/requirements.txt
	@test -x .venv-inference-server/bin/pip || $(PYTHON) -m venv .venv-inference-server
	PIP_CONSTRAINT= .venv-inference-server/bin/python -m pip install --quiet \
		--requirement benchmarks/remote/inference_server.txt
	PIP_CONSTRAINT= .venv-inference-server/bin/python -m pip install --quiet --no-deps \
		--requirement benchmarks/requirements.txt
	@touch $@

# Without the examples and what a server does by itself, which do not depend on these versions.
COMPATIBLE := tests/wire tests/client tests/server tests/end_to_end tests/core/test_numba_kernels.py \
	tests/core/test_whole.py --ignore tests/end_to_end/test_demo.py --ignore tests/end_to_end/test_joint_example.py \
	--ignore tests/end_to_end/test_under_load.py
compat: .venv-oldest/.installed
	@$(call compiled,.venv-oldest/bin)
	.venv-oldest/bin/python -m pytest $(COMPATIBLE) $(SIDE_BY_SIDE)
	.venv-oldest/bin/python -m pytest $(COMPATIBLE) -m alone

# Ends with a table: which framework, which version, whether its lines passed.
trainers: .venv-trainers/.installed
	@$(call compiled,.venv-trainers/bin)
	.venv-trainers/bin/python -m pytest tests/trainers

# What the server needs beside torch and grpcio, where nothing can be installed: pure Python, to be carried along.
gpu-packages: $(INSTALLED)
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --target .gpu-packages --upgrade \
		$(shell grep -E '^(prometheus-client|grpcio-(health-checking|reflection))==' tests/oldest.txt)

gpu: export PYTHONPATH := proto:core:client:server:.gpu-packages
gpu: PARALLEL = $(shell $(PYTHON) -c "from importlib.util import find_spec as f; \
	print('-n auto' if f('xdist') else '', '-p no:benchmark' if f('pytest_benchmark') else '')")
gpu:
	$(PYTHON) -m benchmarks.core.gpu --json benchmarks/results/core_cuda.json
	$(PYTHON) -m pytest -m gpu tests/core $(PARALLEL)
	$(PYTHON) -m pytest -m gpu tests/device_memory
	$(PYTHON) -m benchmarks.remote.on_gpu --json benchmarks/results/remote_cuda.json

# --no-deps: the usual implementation of this loss needs only torch, its package much more.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.core.cpu --json benchmarks/results/core_cpu.json --plot docs/figures

bench-remote: $(INSTALLED) .venv-inference-server/.installed
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.remote --inference-server .venv-inference-server/bin/python \
		--json benchmarks/results/data_plane_cpu.json --plot docs/figures

MINUTES ?= 5
faults: $(INSTALLED)
	$(BIN)/python -m benchmarks.faults --minutes $(MINUTES) --json benchmarks/results/faults_cpu.json --plot docs/figures

bench-joint: $(INSTALLED)
	$(BIN)/python -m benchmarks.joint --json benchmarks/results/joint_cpu.json

figures: $(INSTALLED)
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python -m benchmarks.bins

constraints:
	@test -x .venv-uv/bin/uv || { $(PYTHON) -m venv .venv-uv && PIP_CONSTRAINT= .venv-uv/bin/pip install --quiet uv; }
	printf 'torch==$(TORCH)\nhatchling\neditables\n' | .venv-uv/bin/uv pip compile --universal --python-version 3.10 \
		--all-extras --no-header --no-annotate --upgrade pyproject.toml - --output-file constraints.txt

clean:
	rm -rf .gpu-packages .venv .venv-inference-server .venv-proto .venv-deploy .venv-sbom .venv-oldest .venv-interpreter .venv-trainers .venv-uv out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find proto core client server -name __pycache__ -type d -exec rm -rf {} +
