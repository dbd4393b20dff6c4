# `make help` lists the targets. PYTHON=... picks the interpreter; TORCH_INDEX=... the index torch alone comes from;
# WORKERS=... the processes that share the tests.

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
CUDA_TORCH ?= 2.14.1
TORCH ?= 2.11.0
GPU_PYTHON ?= 3.12
HAS ?=
GPU_FLAGS ?=
PIP_INSTALL := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# What pip would do on one core. Packages hold files that are meant not to compile.
COMPILE := @.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
IN_VENV := env PATH="$(CURDIR)/.venv/bin:$$PATH"
# A file's tests stay in one process, which makes its fixtures once; files start in their order, launches first.
IN_WORKERS := env OMP_NUM_THREADS=1 pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
LAUNCH := sh -c 'if $$0 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then exec deepspeed --quiet "$$@"; \
	else DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 exec deepspeed --quiet --num_accelerators 2 "$$@"; fi' python
CLUSTER_TOOLS := pdsh ssh sshd ip unshare

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: cluster-tools help setup check format test-unit test slow-test faults cluster-test cluster-faults other-torch demo sft-380m fake-gpu wheels bench-gpu clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.installed-dev  ## make .venv and install the project and its tools into it

.venv/.made: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is no Python 3.11 or newer: name one, make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into .venv: about two minutes beside the download"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch)
	@touch $@

.venv/.installed: .venv/.made setup.py
	$(PIP_INSTALL) --editable .
	$(COMPILE)
	@touch $@

.venv/.installed-dev: .venv/.made setup.py
	$(PIP_INSTALL) --editable '.[dev]'
	$(COMPILE)
	@touch .venv/.installed $@

check: .venv/.installed-dev  ## formatting, lint and types
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .
	$(IN_VENV) pyright

format: .venv/.installed-dev  ## rewrite files as `make check` wants them
	$(IN_VENV) ruff format .
	$(IN_VENV) ruff check --fix .

test-unit: .venv/.installed-dev  ## the tests of single modules, in process
	$(IN_VENV) $(IN_WORKERS) tests/unit -m 'not slow'

test: .venv/.installed-dev  ## the test suite, without what takes minutes
	$(IN_VENV) $(IN_WORKERS) tests --ignore=tests/cluster -m 'not slow'

slow-test: .venv/.installed-dev  ## the tests that take minutes
	@$(PIP_INSTALL) --editable '.[mlx]' || echo "there is no MLX for this machine: its test is skipped" >&2
	$(IN_VENV) pytest tests --ignore=tests/cluster --ignore=tests/faults -m slow

faults: .venv/.installed-dev  ## kills, signals and a full disk, everywhere: the whole matrix, as root for the disk
	$(IN_VENV) pytest tests/faults -v

cluster-test: .venv/.installed-dev cluster-tools  ## two hosts in network namespaces, over ssh: needs root and Debian packages
	$(IN_VENV) pytest tests/cluster -m 'not slow'

cluster-faults: .venv/.installed-dev cluster-tools  ## hosts that die, hang, are cut off and come back; how long each costs
	$(IN_VENV) pytest tests/cluster/test_supervise.py tests/cluster/test_supervise_ends.py tests/cluster/test_chaos.py -s

other-torch: .venv/.installed-dev  ## what a supervised run needs of PyTorch's inner parts, under another version: TORCH=2.11.0
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --target .torch-$(TORCH) torch==$(TORCH)
	$(IN_VENV) env PYTHONPATH=$(CURDIR)/.torch-$(TORCH) pytest tests/unit/cluster/test_rendezvous_plugin.py

cluster-tools:
	@test "$$(id -u)" = 0 || { echo "make cluster-test makes network namespaces: run it as root" >&2; exit 2; }
	@for tool in $(CLUSTER_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
		test -z "$$missing" || { echo "make cluster-test lacks$$missing:" \
		"apt-get install pdsh openssh-client openssh-server iproute2" >&2; exit 2; }

demo: .venv/.installed  ## an empty machine -> data, a trained model, an assistant made of it, exports, reports
	$(IN_VENV) ds-slm prepare demo
	$(IN_VENV) $(LAUNCH) ds_slm/pretrain.py
	rm -rf exports/demo exports/demo-instruct
	$(IN_VENV) ds-slm eval runs/demo --tasks documentation
	$(IN_VENV) ds-slm export runs/demo --out exports/demo
	$(IN_VENV) python benchmarks/demo_report.py runs/demo exports/demo
	$(IN_VENV) $(LAUNCH) sft/train.py --recipe demo-instruct --base runs/demo
	$(IN_VENV) ds-slm export runs/demo-instruct --out exports/demo-instruct
	$(IN_VENV) python benchmarks/demo_answers.py runs/demo-instruct exports/demo-instruct
	$(IN_VENV) ds-slm report runs/demo runs/demo-instruct --out exports/demo.html

sft-380m: .venv/.installed  ## one step of the 380M fine-tuning recipe on a CPU: CONVERSATIONS=file.jsonl RANKS=cl100k_base.tiktoken
	$(IN_VENV) python benchmarks/sft_380m.py $(CONVERSATIONS) --ranks $(RANKS)

fake-gpu:  ## every forward path on a GPU that is not there, with the CUDA build of PyTorch (5.5 GB in .venv-cuda)
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip --disable-pip-version-check install --quiet --no-compile torch==$(CUDA_TORCH)
	.venv-cuda/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --editable . pytest hypothesis
	.venv-cuda/bin/python -m pytest tests/fake_gpu

wheels: .venv/.installed  ## what a GPU machine without a network lacks, in .whl/: GPU_PYTHON=3.12 HAS="numpy pandas"
	$(IN_VENV) python benchmarks/wheels.py --python $(GPU_PYTHON) --has $(HAS)

bench-gpu: $(if $(wildcard .whl),,.venv/.installed)  ## one GPU in eight minutes, the most valuable first; with .whl/ also without a network
	$(if $(wildcard .whl),benchmarks/bare_gpu.sh,$(IN_VENV) python benchmarks/gpu.py) $(GPU_FLAGS)

clean:  ## remove .venv and caches; data, runs and exports stay
	rm -rf .venv .venv-cuda .torch-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
