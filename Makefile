# Two commands: `make demo` and `make test`. Everything they need goes into .venv; everything they leave into .demo.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= .demo
MONTHS ?= 4-7
# A CPU build, never the CUDA one: without such a build at hand the PyTorch tests are skipped and say so.
TORCH ?= torch==2.13.0+cpu

BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
export RAY_USAGE_STATS_ENABLED = 0
export DO_NOT_TRACK = 1
# Without bytecode every process compiles what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

# Two halves of about the same length run beside each other: whole Dags and training in Ray, and everything else.
HEAVY := tests/e2e tests/integration/test_ray_train.py tests/integration/test_training_driver.py
LIGHT := tests/unit tests/integration $(HEAVY:%=--ignore=%)

.PHONY: demo ui clean test test-fast test-k8s lint format bench dist help

help: ## the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ..."'
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"

$(VENV)/.demo-installed: setup.cfg constraints.txt | $(BIN)/uv
	@echo "Installing airflow-mlops with its demo (tested versions from constraints.txt)"
	@$(UV) --editable '.[demo]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.demo-installed
	@echo "Installing what the tests need"
	@$(UV) --editable '.[dev,lightgbm]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '$(TORCH)' 2>/dev/null \
	  || echo "PyTorch tests will be skipped: no $(TORCH) at the configured package indexes; name a build with make TORCH=..."
	@touch $@

demo: $(VENV)/.demo-installed ## a year of real data, a model kept trained: MONTHS=4-7 (default) to 4-12
	@$(BIN)/python -m airflow_mlops.embedded.demo --root $(DEMO) --months $(MONTHS)

ui: $(VENV)/.demo-installed ## the same, left running with the Airflow UI until Ctrl-C
	@$(BIN)/python -m airflow_mlops.embedded.demo --root $(DEMO) --months $(MONTHS) --keep

clean: ## stop what the demo left running and remove what it wrote
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m airflow_mlops.embedded.demo --root $(DEMO) --clean; else rm -rf $(DEMO); fi

test: $(VENV)/.dev-installed lint ## lint, types, import contracts, all tests
	@beside=$$(mktemp); $(BIN)/python -m pytest $(LIGHT) --durations=10 > $$beside 2>&1 & other=$$!; \
	trap 'kill $$other 2>/dev/null; rm -f $$beside' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/python -m pytest $(HEAVY) --durations=10; heavy=$$?; \
	echo "the other tests, meanwhile:"; wait $$other; light=$$?; cat $$beside; exit $$((heavy || light))

test-fast: $(VENV)/.dev-installed ## the unit tests
	@$(BIN)/python -m pytest tests/unit

test-k8s: $(VENV)/.dev-installed ## the Kubernetes tests on the cluster in KUBECONFIG, with KubeRay (KUBE_RAY_IMAGE=...)
	@test -n "$(KUBECONFIG)" || { echo "Name a cluster: make test-k8s KUBECONFIG=path"; exit 1; }
	@KUBECONFIG="$(KUBECONFIG)" TEST_LIVE_CLUSTER=1 $(BIN)/python -m pytest tests/integration/kube -m live -v

lint: $(VENV)/.dev-installed ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev-installed ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev-installed ## the numbers, as ratios, into bench.json
	@$(BIN)/python -m tests.bench

dist: $(VENV)/.dev-installed ## a wheel and an sdist
	@$(BIN)/python -m build --outdir dist .
