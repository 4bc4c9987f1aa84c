# make serve: the demo model over HTTP. make run: on both backends. make test: what CI runs. They need python3 >= 3.11
# and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Python keeps the bytecode of what it imports, whatever the environment says: pip makes none, as that of all 16,000
# files is as much work as half of the rest of an install.
export PYTHONDONTWRITEBYTECODE =
PIP = -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: serve run test test-all test-next lint proto clean

# PORT and MODEL, a folder, are optional.
serve: $(READY)
	@exec $(BIN)/radixmesh serve $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model '$(MODEL)')

run: $(READY)
	$(BIN)/radixmesh generate --compare

# Two processes at once, each with whole files of tests; in order, as the long ones come first.
TEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python $(TEST) -m "not slow"

test-all: lint
	$(BIN)/python $(TEST)

# The jax side with the newest jax, which needs python >= 3.12: NEXT=python3.14 names one. Golden records are of the jax
# that dev pins.
NEXT ?= $(shell for v in 3.15 3.14 3.13 3.12; do python$$v -c 'pass' 2>/dev/null && echo python$$v && break; done)
NEXT_BIN := $(VENV)-next/bin

test-next:
	@test -n '$(NEXT)' || { echo "test-next: no python >= 3.12 on this machine; name one: make test-next NEXT=/path/to/python3.12" >&2; exit 2; }
	@'$(NEXT)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
		|| { echo "test-next: $(NEXT) is no python >= 3.12" >&2; exit 2; }
	test -x $(NEXT_BIN)/python || '$(NEXT)' -m venv $(VENV)-next
	$(NEXT_BIN)/python $(PIP) --upgrade --upgrade-strategy eager -e '.[next]'
	$(NEXT_BIN)/python $(TEST) -m "not slow" tests/backends/test_jax*.py tests/compile \
		tests/test_rooms.py --ignore tests/compile/test_golden.py --ignore tests/compile/test_gpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is made from engine/serve/radixmesh.proto; tests/serve/test_grpc.py compares it.
proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iengine/serve/pb=engine/serve --python_out=. --pyi_out=. \
		--grpc_python_out=. engine/serve/pb/radixmesh.proto

$(READY): pyproject.toml
	@echo "installing into $(VENV): some 3 GB, a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -e '.[dev]'
	@# openai 2.x beside 3.x, for tests/serve/test_openai2.py: all that they don't share
	$(BIN)/python $(PIP) --upgrade --no-deps --target $(VENV)/openai2 'openai>=2,<3' 'distro>=1.7,<2'
	$(BIN)/python -c 'import engine.run.child, engine.serve.http, backends.jax.backend, backends.torch.backend'
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-next build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
