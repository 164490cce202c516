# make demo, make test: on a fresh clone with nothing but Python, 3.11 or newer. `make help` lists the rest.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/runs-torch-$(TORCH)
INSTALLED := $(VENV)/installed-torch-$(TORCH)
# uv shows a bar, and takes torch without CUDA where no NVIDIA driver is: 0.3 GB with transformers, not the 2.8 of pip. uv
# does not read pip's settings, so where it fails pip tries: $(1) what to install, $(2) for uv, $(3) for pip.
install = { uv="$$(command -v uv || command -v $(BIN)/uv)" && "$$uv" pip install $(2) --python $(BIN)/python $(1); } \
  || { echo "uv did not install it: pip does"; $(BIN)/python -m pip install --no-compile $(3) $(1); }

.PHONY: help demo test lint chromium matrix matrix-ci matrix-torch bench gpu docs dist clean

help:
	@echo "make demo       stock float16 prints !!!!!!!!, the fix prints the fp32 text"
	@echo "make test       lint, types and all tests, on the newest supported transformers"
	@echo "make matrix     the conformance suite on every listed transformers release (about 20 minutes)"
	@echo "make matrix-ci  the same on one release of each range module; the installed one is make test's"
	@echo "make matrix-torch  the same on torch 2.4 to the newest, two or three releases each; downloads some 20 GB, needs g++"
	@echo "make bench      how fast the fix is, beside stock and what else one could do; BENCH=full takes hours on a CPU"
	@echo "make gpu        proves the fix on this machine's GPU and times it, in 8 minutes; DEVICE=cpu rehearses it"
	@echo "make docs       the handbook, into build/handbook; open its index.html"
	@echo "make dist       the wheel and the sdist of a release, the same bits wherever they are built"
	@echo "TORCH=2.6.0, PYTHON=python3.12 and VENV=elsewhere change what they run on"

# A Python that has torch and a supported transformers needs nothing installed, unless TORCH or VENV asks for another.
demo:
	@if test -z "$(wildcard $(RUNS))$(filter-out file,$(origin TORCH) $(origin VENV))" \
	  && $(PYTHON) -m qwen2_fp16_fix status >/dev/null 2>&1; \
	then echo "$(PYTHON) has torch and transformers: nothing to install"; $(PYTHON) -m qwen2_fp16_fix demo; \
	else $(MAKE) --no-print-directory $(RUNS) && $(BIN)/qwen2-fp16-fix demo; fi

test: chromium lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup  # a worker a core: threads of theirs would only wait

# The report's tests look at it in a browser. Asked for first, before minutes of anything else; never installed unasked.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
chromium:
	@for browser in $(BROWSERS); do command -v $$browser >/dev/null && exit 0; done; echo "make test needs the browser \
	Chromium, which is not here: install it (Debian, Ubuntu: sudo apt-get install chromium) and start again." >&2; exit 1

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

matrix: $(INSTALLED)
	$(BIN)/python tools/matrix.py --torch $(TORCH)

matrix-ci: $(INSTALLED)
	$(BIN)/python tools/matrix.py --torch $(TORCH) --ci

matrix-torch: $(INSTALLED)
	$(BIN)/python tools/torch_matrix.py

bench: $(INSTALLED)
	$(call install,-e ".[bench]")
	$(BIN)/python -m benchmarks $(if $(filter full,$(BENCH)),--full)

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks gpu $(if $(DEVICE),--device $(DEVICE))

docs: $(INSTALLED)
	$(call install,-e ".[docs]")
	$(BIN)/python tools/draw_rooms.py
	rm -rf build/handbook
	$(BIN)/sphinx-build -qW --keep-going docs build/handbook
	$(BIN)/sphinx-build -qW --keep-going -c docs -t zh docs/zh build/handbook/zh
	! grep -rnE '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//' build/handbook --include='*.html'  # else a reader offline lacks it

dist: $(INSTALLED)
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --no-isolation >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	@$(BIN)/twine check --strict dist/* >build/dist.log || { cat build/dist.log; exit 1; }
	@ls -sh1 dist/*

# torch first and alone: an index that also holds CUDA builds would otherwise choose one. The install is editable.
$(RUNS): pyproject.toml
	@echo "1 of 3: a virtual environment, $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(BIN)/python -m pip install -q --no-compile uv || true
	@echo "2 of 3: torch $(TORCH), the largest part"
	@$(call install,"torch==$(TORCH)",--torch-backend=$${UV_TORCH_BACKEND:-auto})
	@echo "3 of 3: transformers and what it needs"
	@$(call install,-e .,,-q)
	@touch $@

$(INSTALLED): $(RUNS)
	@echo "installing what the tests and checks need into $(VENV)"
	@$(call install,-e ".[dev]",,-q)
	@touch $@

clean:
	rm -rf $(VENV) .matrix build dist
