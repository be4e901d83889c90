# The one door. Each target first lets tools/setup bring what it needs: on a fresh Debian 12 as root that is
# packages, .venv, the package itself and the compiled kernel programs.
#   ARGS='…'  goes to hookline or pytest: make demo ARGS=--json, make test ARGS='-k maglev'
#   DEBUG=1   compiles the kernel programs with their source lines and bpf_printk
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export LC_ALL := C.UTF-8
export DEBUG ARGS
PYTHON := .venv/bin/python
# The virtual machines first: nothing takes longer.
TESTS := tests/vm tests/lab tests/kernel tests/unit
C_SOURCES = $(shell find src tests tools examples -name node_modules -prune -o -name '*.[ch]' -print)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: ## balance real traffic in a lab of network namespaces (about half a minute)
	@tools/setup $@
	@.venv/bin/hookline demo $(ARGS)

.PHONY: test
test: ## unit, kernel and lab tests, and the core of the kernel tests on Linux 6.1 and 6.12
	@tools/setup $@
	@export HOOKLINE_TEST_RUN=t$$(od -An -N3 -tx1 /dev/urandom | tr -d ' '); \
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS) || { \
		echo 'make test: what failed beside others is tried once more, alone; what was left behind still counts'; \
		$(PYTHON) -m pytest --last-failed --last-failed-no-failures none $(TESTS); }

.PHONY: test-all
test-all: ## all tests, slow ones too
	@tools/setup $@
	@$(PYTHON) -m pytest -m '' tests $(ARGS)

.PHONY: test-vm
test-vm: ## kernel tests on Debian's kernels 6.1 and 6.12, in virtual machines
	@tools/setup $@
	@$(PYTHON) -m tools.vm --together --timeout 3600 .venv/bin/python -m pytest tests/kernel --ignore tests/kernel/test_setup.py $(ARGS)

.PHONY: kernels-table
kernels-table: ## docs/kernels.md anew: what runs on which kernel, by the tests that show it
	@tools/setup $@
	@$(PYTHON) -m tools.kernels_table $(ARGS)

.PHONY: mutants
mutants: ## wrong policy evaluators: which of them the tables of tests/policy notice (all, or it fails)
	@tools/setup $@
	@$(PYTHON) -m tools.mutants $(ARGS)

.PHONY: test-fresh
test-fresh: ## make demo and make test in a fresh Debian 12
	@tools/setup $@
	@tools/test_fresh $(ARGS)

.PHONY: check
check: ## formatting, lint, strict types
	@tools/setup $@
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	clang-format-19 --dry-run --Werror $(C_SOURCES)

.PHONY: format
format: ## format Python and C, mend what lint can
	@tools/setup $@
	$(PYTHON) -m ruff check --fix --exit-zero --quiet .
	$(PYTHON) -m ruff format .
	clang-format-19 -i $(C_SOURCES)

.PHONY: ebpf-programs
ebpf-programs: ## compile the kernel programs, load each and run packets through it
	@tools/setup $@
	@$(PYTHON) tools/build_objects.py --reproduce
	@$(PYTHON) -m tools.programs_report $(ARGS)

.PHONY: bench
bench: ## measure the claims on this machine
	@tools/setup $@
	@.venv/bin/hookline bench $(ARGS)

.PHONY: diagrams
diagrams: ## render docs/diagrams/*.mmd
	@tools/setup $@
	@tools/diagrams/render

.PHONY: wheel
wheel: ## build dist/*.whl, kernel programs inside
	@tools/setup $@
	@$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

.PHONY: setup
setup: ## prepare everything and do nothing with it
	@tools/setup $@

.PHONY: clean
clean: ## remove all that make made here, .venv too
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis tools/diagrams/node_modules
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
	find src -name '*.bpf.o' -delete
