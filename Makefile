# make demo   train a tokenizer and a small LVM on emoji, then report on pictures they never saw
# make long   the same for longer, with better pictures
# make test   every test, and the linter
# make bench  timings
# Each sets itself up in .venv: nothing is needed but Python >= 3.11 and make.

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo long test bench

demo long: .venv/installed
	$(PY) train.py --config configs/$@_tokenizer.toml
	$(PY) data.py tokenize --config configs/$@_lvm.toml --out out/$@/rows.jsonl
	$(PY) data.py tokenize --config configs/$@_lvm.toml --out out/$@/held_out.jsonl --split held_out
	$(PY) train.py --config configs/$@_lvm.toml
	$(PY) bench/lvm_report.py --run out/$@/lvm --out out/$@

test: .venv/installed-test
	.venv/bin/ruff check .
	$(PY) -m pytest -q

bench: .venv/installed
	$(PY) bench/speed.py

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
