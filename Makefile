# Two commands matter: `make serve` and `make test`. Everything else is for people who change the code.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
# A CPU build of this torch serves every test; set TORCH= to keep the one that is installed.
TORCH ?= torch==2.13.0
PORT ?= 8000
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test test-images lint typecheck format bench bench-gpu test-gpu train-model install dev clean chaos test-chaos fuzz-api \
	loadtest loadtest-peers loadtest-compare

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[worker,redis]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.serve
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,redis]'
	touch $@

install: $(VENV)/.serve
dev: $(VENV)/.dev

serve: $(VENV)/.serve
	exec $(BIN)/darkroom up --port $(PORT)

# One process for each core, with one thread for its networks; a file's tests share what it sets up.
test: $(VENV)/.dev
	sh tests/system-packages.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# CI does this when one of IMAGE_INPUTS is not the file that it was done with last.
IMAGE_INPUTS := docker/Dockerfile docker/compose.yaml docker/requirements.py .dockerignore pyproject.toml \
	constraints.txt tests/support/compose.py tests/support/images.py tests/test_docker_images.py
test-images: $(VENV)/.dev
	sh tests/system-packages.sh images
	$(BIN)/pytest -m images tests/test_docker_images.py
	sha256sum $(IMAGE_INPUTS) > docker/proven.sha256

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# So many random kills under load, from one seed. `test-chaos` runs the cases that `make test` leaves out.
KILLS ?= 1000
SEED ?= 1
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED)

test-chaos: $(VENV)/.dev
	$(BIN)/pytest -m chaos tests/chaos

# So many calls that schemathesis makes up from the OpenAPI document.
CASES ?= 100000
fuzz-api: $(VENV)/.dev
	$(BIN)/python -m tests.support.api_fuzzer --cases $(CASES) --seed $(SEED)

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.single_image --record
	$(BIN)/python -m benchmarks.concurrent --record
	$(BIN)/python -m benchmarks.service --record
	$(BIN)/python -m benchmarks.full_size_parity --record
	$(BIN)/python -m benchmarks.quality --record
	$(BIN)/python -m benchmarks.cpu_unet --record

# BENCH_ARGS="--quick" begins points for 85 s; "--section models" is one section. A run that was stopped goes on where it was.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

# LitServe lies on top of the other packages, out of their sight: it would change what Darkroom's API runs on.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(PEERS)/.peers: $(VENV)/.dev
	$(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > $$($(PEERS)/bin/python $(PURELIB))/beneath.pth
	$(PEERS)/bin/pip install -q -c constraints.txt -e '.[peers]'
	touch $@

# LOADTEST_URL= loads a server that runs already. LOADTEST_ARGS="--parts ladder --seconds 30" is one part, for longer.
loadtest: $(VENV)/.dev $(PEERS)/.peers
	$(BIN)/python -m loadtests $(LOADTEST_ARGS)

loadtest-peers: $(VENV)/.dev $(PEERS)/.peers
	$(BIN)/python -m loadtests.peers $(LOADTEST_ARGS)

# A= and B= are report directories.
loadtest-compare: $(VENV)/.dev
	$(BIN)/python -m loadtests.compare $(A) $(B)

# TRAIN_ARGS="--minutes 16 --out runs": a run that was stopped goes on when the same command is given again.
train-model: $(VENV)/.dev
	$(BIN)/python -m training $(TRAIN_ARGS)

clean:
	rm -rf $(VENV) $(PEERS) build dist
