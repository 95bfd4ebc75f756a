# make demo   train a tokenizer and a small LVM on emoji, then report on pictures they never saw
# make long   the same for longer, with better pictures
# make parts  train a CLIP, a latent diffusion and a language model on emoji: what DreamLLM is made of
# make dream  join them to a DreamLLM in four stages, then report on pictures it never saw
# make test   every test, and the linter
# make bench  timings
# make real   a published language model of 135M (downloads 93 MB): our numbers beside transformers'
#
# A training that was interrupted goes on where it was; one that is complete does nothing.
# Each sets itself up in .venv: nothing is needed but Python >= 3.11 and make.

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo long parts dream test bench real

demo long: .venv/installed
	$(PY) train.py --config configs/$@_tokenizer.toml
	$(PY) prepare.py tokenize --config configs/$@_lvm.toml --out out/$@/rows.jsonl
	$(PY) prepare.py tokenize --config configs/$@_lvm.toml --out out/$@/held_out.jsonl --split held_out
	$(PY) train.py --config configs/$@_lvm.toml
	$(PY) bench/lvm_report.py --run out/$@/lvm --out out/$@

parts: .venv/installed out/emoji/names.jsonl out/emoji/held_out_names.jsonl
	$(PY) train.py --config configs/emoji_vae.toml
	$(PY) train.py --config configs/emoji_clip.toml
	$(PY) train.py --config configs/emoji_unet.toml
	$(PY) train.py --config configs/emoji_llama.toml

out/emoji/vocabulary/tokenizer.json: | .venv/installed
	$(PY) prepare.py vocabulary --config configs/emoji_llama.toml --out out/emoji/vocabulary

out/emoji/names.jsonl: out/emoji/vocabulary/tokenizer.json
	$(PY) prepare.py tokenize --config configs/emoji_llama.toml --out $@

out/emoji/held_out_names.jsonl: out/emoji/vocabulary/tokenizer.json
	$(PY) prepare.py tokenize --config configs/emoji_llama.toml --out $@ --split held_out

dream: parts
	$(PY) train.py --config configs/dream_understand.toml
	$(PY) train.py --config configs/dream_create.toml
	$(PY) train.py --config configs/dream_interleaved.toml
	$(PY) train.py --config configs/dream_instruct.toml
	$(PY) bench/dream_report.py --run out/emoji/dream/instruct --clip out/emoji/clip --unet out/emoji/unet --out out/emoji/dream

test: .venv/installed-test
	.venv/bin/ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile

bench: .venv/installed
	$(PY) bench/speed.py

real: .venv/installed-test
	$(PY) -m pip install --quiet --disable-pip-version-check gguf==0.19.0 accelerate==1.15.0
	$(PY) bench/real.py --out out/real

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
