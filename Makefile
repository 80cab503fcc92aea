# The first `make demo` or `make test` sets everything up; CONTRIBUTING.md tells how.

SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help demo test test-long lint bench clean packages packages-dev requirements

bin := .venv/bin
export TIMEFORMAT := %1R s
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 20

demo: .venv/runtime ## boot a throw-away VM and run a command in it
	$(bin)/banger vm run --rm -- uname -a

test: lint ## check everything: lint, then all tests, on real guests
	$(bin)/python -m pytest

test-long: .venv/dev ## the tests that take minutes each, in a guest that is a whole host
	$(bin)/python -m pytest -m long tests/hosted

lint: .venv/dev ## ruff, mypy and the floors of the house
	time $(bin)/ruff check
	time $(bin)/ruff format --check
	time $(bin)/mypy
	time $(bin)/lint-imports

bench: .venv/dev ## measure what banger costs on this machine
	$(bin)/python -m bench

clean: ## remove what make made here; VMs, images and kernels stay
	rm -rf .venv build dist .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

packages:
	time setup/packages

.venv/bin/python: | packages
	time setup/venv

.venv/dev: | packages-dev

packages-dev: packages
	setup/packages $$(sed 's/#.*//' setup/packages-dev.txt)

# Wheels only: a host that has nothing but Python has no compiler. The project itself goes in
# without dependencies or isolation, so its build backend is one of the pinned packages too.
.venv/%: requirements/%.txt pyproject.toml | packages .venv/bin/python
	time $(bin)/python -m pip install -qq --require-hashes --only-binary :all: --requirement $<
	$(bin)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

lock = $(bin)/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make requirements" $(UPGRADE)

requirements: .venv/dev ## pin the dependencies of pyproject.toml anew; UPGRADE=--upgrade takes newer ones
	$(lock) pyproject.toml --group build --output-file requirements/runtime.txt
	$(lock) pyproject.toml --group dev --constraint requirements/runtime.txt --output-file requirements/dev.txt
	$(lock) --group peers --constraint requirements/dev.txt --output-file requirements/peers.txt
