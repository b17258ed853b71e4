# `make demo` and `make test` set up what they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
STAMP := .venv/.installed# to run, the demo included
DEV := .venv/.dev# and to test and measure
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install install-gpu demo test test-all test-oldest test-range fuzz lint bench bench-quick bench-check bench-train kernel-report gpu-check clean

install: $(STAMP)

# Without an NVIDIA driver, torch comes from PyTorch's index of CPU builds, which bring no CUDA libraries: gigabytes less.
# Where that index cannot be reached, pip's own takes its place. `make install TORCH=cuda` or TORCH=cpu decides. No other
# index is asked meanwhile: torch of the one and torchvision of the other do not fit together.
TORCH ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
CPU_BUILDS := https://download.pytorch.org/whl/cpu

# The second of the .pth file's lines finds swim_kernels; the first lets Python find the package from the folder above
# the clone, too, where the clone itself would pass for a namespace package: pip's own finder comes after that.
$(STAMP): setup.py
	$(PYTHON) -m venv .venv
ifeq ($(TORCH),cpu)
	@echo "no nvidia-smi: trying torch's CPU builds ($(CPU_BUILDS)); TORCH=cuda takes pip's own"
	@PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= $(BIN)/pip install --timeout 5 --retries 0 \
		--index-url $(CPU_BUILDS) 'torch>=2.11' torchvision && $(BIN)/python -c 'import torchvision' || \
		{ echo "no CPU builds from there: going on with pip's own torch, which may bring CUDA: 6.0 GB in place of 2.5"; \
		$(BIN)/pip uninstall --quiet --yes torch torchvision; }
endif
	$(BIN)/pip install -e '.[demo]'
	$(BIN)/python -c 'import site; print("$(CURDIR)", "$(CURDIR)/kernels", sep="\n", \
		file=open(site.getsitepackages()[0] + "/swim_fast_checkout.pth", "w"))'
	@echo "installed $$(du -sh .venv | cut -f1) in .venv"
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install -e '.[dev,demo]'
	touch $@

# The extras for GPUs. flash-attn's build imports torch, so it comes after torch and is not isolated from it. It takes
# 9 GB a job; FLASH_ATTN_CUDA_ARCHS=90 builds for Hopper alone instead of four architectures. flash-attn 2.8.3 asks for
# C++17, with which torch 2.14's headers do not compile; with C++20 they do.
MAX_JOBS ?= 4
FLASH_ATTN := build/flash-attn
install-gpu: $(STAMP)
	$(BIN)/pip install wheel packaging ninja psutil 'setuptools>=77'
	rm -rf $(FLASH_ATTN)
	$(BIN)/pip download --no-build-isolation --no-deps --no-binary flash-attn -d $(FLASH_ATTN) flash-attn
	tar xzf $(FLASH_ATTN)/*.tar.gz -C $(FLASH_ATTN)
	sed -i s/std=c++17/std=c++20/ $(FLASH_ATTN)/*/setup.py
	MAX_JOBS=$(MAX_JOBS) $(BIN)/pip install --no-build-isolation ./$(FLASH_ATTN)/*/
	$(BIN)/pip install -e '.[cuda,deepspeed]'

demo: $(STAMP)
	$(BIN)/swim-fast demo configs/demo.yaml $(ARGS)

# Files of tests go to as many processes, of one thread each, as there are to be WORKERS.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

test: $(DEV)
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/triton_interpreter
	$(BIN)/python -m tests.helpers.pretend_gpu $(BIN)/pytest tests/pretend_gpu

test-all: $(DEV)
	$(BIN)/pytest tests -m ''
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton_interpreter -m ''
	$(BIN)/python -m tests.helpers.pretend_gpu $(BIN)/pytest tests/pretend_gpu -m ''

# Kernels, models and training with the oldest torch, triton and transformers of setup.py, in an environment of its own.
# The folder of compiled extensions is its own too: torch 2.11 waits for ever at the lock file that newer ones leave there.
test-oldest: export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(OLDEST)/torch_extensions
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest tests/kernels tests/modeling tests/training
	TRITON_INTERPRET=1 $(OLDEST)/bin/pytest tests/kernels/triton_interpreter

$(OLDEST)/.installed: setup.py tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint tests/oldest.txt -e '.[test]'
	touch $@

# What depends on transformers, with releases of its range before the newest, which `make test` has: the oldest, and
# the last that takes peft 0.21. An environment holds its transformers; all else is .venv's.
RANGE ?= 5.17.0 5.23.0
RANGE_TESTS := tests/data/sample tests/data/batch tests/families tests/modeling tests/inference tests/test_position_ids.py \
	tests/training/test_adapters.py tests/training/test_packing.py
test-range: $(RANGE:%=test-transformers-%)

test-transformers-%: .venv-range/%/.installed
	OMP_NUM_THREADS=1 .venv-range/$*/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(RANGE_TESTS)

.SECONDARY: $(RANGE:%=.venv-range/%/.installed)
.venv-range/%/.installed: $(DEV)
	$(BIN)/python -m venv .venv-range/$*
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' > \
		$$(.venv-range/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth
	.venv-range/$*/bin/python -m pip install --quiet 'transformers==$*'
	touch $@

# Damaged inputs in large number, of which `make test` has a few hundred: a quarter of an hour.
CASES ?= 10000
fuzz: $(DEV)
	$(BIN)/pytest tests/fuzz --fuzz-cases $(CASES)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Time and memory of the attention loss beside flash attention, by three methods: twenty minutes on two cores.
bench: $(DEV)
	rm -f benchmarks/attention_loss/attention_loss.csv
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.attention_loss $(ARGS)

# The same at 4,096 tokens and 8 rows, into runs/bench-quick: three minutes on two cores that do nothing else.
bench-quick: $(DEV)
	rm -rf runs/bench-quick
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.attention_loss --quick $(ARGS)

# Ratios of bench-quick, or those of `make bench-check CSV=…`, against the committed ones; fails if one grew by over 20 %.
bench-check: $(if $(CSV),$(DEV),bench-quick)
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.attention_loss --check $(or $(CSV),runs/bench-quick/attention_loss.csv)

# Share of the attention loss in a training step, padding, loading: a quarter of an hour on two cores.
bench-train: $(DEV)
	rm -f benchmarks/training/training.csv
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.training $(ARGS)

# Ahead-of-time builds of every kernel configuration and bytes counted in the interpreter: an hour on two cores.
kernel-report: $(DEV)
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.kernels $(ARGS)

# Whether all of this works on a GPU, and how fast: 9 minutes, no network; `ARGS='--device cpu'` tries the check itself.
gpu-check: $(DEV)
	PYTHONPATH=kernels $(BIN)/python -m swim_fast.gpu_check $(ARGS)

clean:
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
