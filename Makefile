# Every target sets up what it needs: a virtual environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# Tests wait for processes more than they compute: three at a time keep two cores busy.
PYTEST := python -m pytest -n 3 --dist worksteal

.PHONY: demo test test-slow test-slurm test-gpu soak hunt exactness families check bench speed scale gpu shortcut hear clean

.venv/installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,pinned]"
	touch $@

demo: .venv/installed  ## the whole way on synthetic music, two ranks on the CPU
	$(RUN) python launch/demo.py

test: .venv/installed  ## everything but the slow tests, the cluster's and the GPU's
	$(RUN) $(PYTEST) -m "not slow and not slurm and not gpu"

SLOW_TESTS ?= slow and not slurm and not gpu
test-slow: .venv/installed  ## the real size with random weights, whole grids: 16 GB of memory, 10 GB of disk
	$(RUN) $(PYTEST) -m "$(SLOW_TESTS)"

# One test at a time: they time signals, and share a cluster. It installs slurm-wlm where it is missing.
SLURM_TESTS ?= slurm
test-slurm: .venv/installed  ## the batch files on a real Slurm of two nodes; root on Debian or Ubuntu
	$(RUN) python -m pytest tests/slurm -m "$(SLURM_TESTS)"

test-gpu: .venv/installed  ## what only a GPU shows, on one of them, in three minutes; fails without one
	$(RUN) python -m pytest tests/gpu -m gpu

soak: .venv/installed  ## 60 random faults to two runs, and what they lost: nothing; 35 minutes
	$(RUN) PYTHONPATH=tests:tests/faults OMP_NUM_THREADS=1 python tests/faults/soak.py

exactness: .venv/installed  ## how far runs on other ranks are from one rank, dropout on: a table; 15 minutes
	$(RUN) PYTHONPATH=tests:tests/faults:tests/training OMP_NUM_THREADS=1 python tests/training/exactness.py

families: .venv/installed  ## each kind of model through each way to train and use it: a table; 25 minutes, needs muq
	$(RUN) PYTHONPATH=tests:tests/faults:tests/encoders OMP_NUM_THREADS=1 python tests/models/families.py

HUNT_SEED ?= 0
hunt: .venv/installed  ## 50 random faults to every command of the whole way, 1 to 3 ranks; 15 minutes
	$(RUN) PYTHONPATH=tests:tests/faults OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/faults/hunt.py --seed $(HUNT_SEED)

check: .venv/installed  ## style, types, and that rooms import only from below
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports

# mosaicml-streaming asks for transformers < 5 and numpy < 2.2, but its reader and writer work
# without them: it comes without its dependencies, the few that it imports are in the extra.
bench: .venv/installed  ## packing, reading, memory against the peers, freezing, cache; 30 minutes, 12 GB of disk
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,bench,pinned]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "mosaicml-streaming==0.13.*"
	$(RUN) python benchmarks/packing.py --json benchmarks/results/packing.json
	$(RUN) python benchmarks/reading.py --tracks 400 --json benchmarks/results/reading.json
	$(RUN) python benchmarks/memory.py --json benchmarks/results/memory.json
	$(RUN) python benchmarks/freezing.py --json benchmarks/results/freezing.json
	$(RUN) python benchmarks/cache.py --json benchmarks/results/cache.json

speed: .venv/installed  ## a step against the original's and Hugging Face's Trainer, scaling, start-up; 20 minutes
	$(RUN) python benchmarks/step.py --json benchmarks/results/step.json
	$(RUN) python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(RUN) python benchmarks/startup.py --json benchmarks/results/startup.json
	$(RUN) python benchmarks/masks.py --json benchmarks/results/masks.json
	for name in step scaling startup; do \
	  $(RUN) python benchmarks/$$name.py --render benchmarks/results/$$name.json || exit 1; done
	$(RUN) python benchmarks/dataplane.py --json benchmarks/results/dataplane.json

scale: .venv/installed  ## what 1,000 to 100,000 tracks cost before a step: seconds and memory, part by part; 10 minutes
	$(RUN) python benchmarks/scale.py --tracks 1000 10000 100000 --json benchmarks/results/scale.json

gpu: .venv/installed  ## training, the Trainer, bias pass and reader on one GPU: a table in 6 minutes
	$(RUN) python benchmarks/gpu.py --json benchmarks/results/gpu.json

shortcut: .venv/installed  ## ten losses on a planted shortcut, five seeds, and their table; 30 minutes
	$(RUN) python benchmarks/shortcut.py --work runs/shortcut --json benchmarks/results/shortcut.json

MUSIC ?=
hear: .venv/installed  ## 87 kinds of audio files against ffmpeg's decoder; repetitions, MUSIC=FOLDER among them; the audit, 40 minutes
	$(RUN) python benchmarks/hearing.py --json benchmarks/results/hearing.json
	$(RUN) python benchmarks/repetitions.py --json benchmarks/results/repetitions.json $(if $(MUSIC),--real $(MUSIC))
	$(RUN) python benchmarks/audit.py --json benchmarks/results/audit.json

clean:  ## remove what `make demo`, `soak`, `hunt` and `shortcut` made, not the virtual environment
	rm -rf data/demo shards/demo runs/demo-poe runs/demo-ce runs/demo-times.json runs/soak runs/hunt runs/shortcut
