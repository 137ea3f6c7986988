.PHONY: check style test test-slow bench

check: ; ruff check . && ruff format --check . && mypy && pytest
style: ; ruff check --fix . && ruff format .
test: ; pytest
test-slow: ; pytest -m slow
bench: ; for program in scripts/bench_*.py; do python $$program || exit 1; done
