# make demo | test | check | format | docs | gpu | clean. All but gpu lives in .venv, which is rebuilt when its inputs
# change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Relative, as all paths here: pip splits the variable at spaces, which the folder's own path may have.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs
ADAPTERS := .venv/adapters

.PHONY: demo test check format docs gpu clean

# Two runs under label noise, without and with a regularizer, in one new folder, and both in one figure; then a few
# more, each method tuned, and a table.
RECIPE := $(BIN)/accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4

demo: $(STAMP)
	@set -e; export OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2); folder=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	echo "1/3: no regularizer"; $(RECIPE) --output_dir $$folder/none; \
	echo "2/3: complexity penalty"; $(RECIPE) --regularizer complexity --weight 0.016 --output_dir $$folder/complexity; \
	$(BIN)/python recipes/overlay.py $$folder/none $$folder/complexity --output_dir $$folder; \
	echo "3/3: a small comparison with weight decay"; $(BIN)/python recipes/compare.py --short --output_dir $$folder/comparison

test: $(STAMP) $(ADAPTERS)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(ADAPTERS)/bin/python -m pytest tests/callbacks/test_callbacks.py alignreg/callbacks

# An environment on top of the other: torchmetrics imports transformers wherever it is installed, which takes seconds.
$(ADAPTERS)/installed: $(STAMP)
	$(BIN)/python -m venv $(ADAPTERS)
	$(BIN)/python -c "import glob, site; here, = glob.glob('$(ADAPTERS)/lib/*/site-packages'); \
	  open(here + '/below.pth', 'w').write(f'import site; site.addsitedir({site.getsitepackages()[0]!r})\n')"
	$(ADAPTERS)/bin/python -m pip install --quiet lightning transformers
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors, broken links and references among them; the tutorials are run.
docs: $(DOCS_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going -n docs docs/_build/html
	@echo "open docs/_build/html/index.html"

# With the Python that is there, whose torch knows the GPU; make gpu FLAGS="--limit 8 --parts correct kernel".
gpu:
	$$(command -v python || command -v python3) benchmarks/gpu.py $(FLAGS)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

# One stamp for recipes and dev together: `make test` after `make demo` finds pytest.
$(STAMP): pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python >= 3.10 or pass PYTHON=..."; exit 1; }
	@echo "installing into .venv with $(PYTHON), once; about 2 GB with the CPU build of torch, more with a CUDA build"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[recipes,dev]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build docs/api docs/learn docs/benchmarks.md docs/gpu.md
