.PHONY: check style test test-slow test-nightly bench

check: ; ruff check . && ruff format --check . && mypy && pytest
style: ; ruff check --fix . && ruff format .
test: ; pytest
test-slow: ; pytest -m slow
test-nightly: ; pytest -m nightly
bench: ; for program in scripts/bench_*.py; do python $$program || exit 1; done
