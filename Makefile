# make demo   train the tiny preset, evaluate it, show what it heard      (a few minutes on two CPU cores)
# make test   the test suite
# make bench  speeds, beside other libraries
# make clean  remove the environment, the spoken corpus and the demo's checkpoint

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
REQS   := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
READY  := $(VENV)/.ready

.PHONY: demo test bench clean
demo: $(READY)
	$(PY) train.py --preset tiny --out out $(if $(wildcard out/state.pt),--resume)
	$(PY) eval.py --ckpt out

test: $(READY)
	$(PY) -m pytest -q --durations=8 test_all.py

bench: $(READY) requirements-bench.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	$(PY) bench.py augment

# PyPI has torchaudio and torchvision for CUDA only. Beside a CPU torch their libraries fail to load and take
# `import transformers` down with them; in pure Python torchaudio resamples just as well. Where they load, nothing
# happens here.
$(READY): requirements.txt requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r $(REQS)
	@$(PY) -c "import torchaudio" 2>/dev/null || { \
	  echo "CPU torch: removing the CUDA libraries of torchaudio"; \
	  rm -f $(VENV)/lib/python3.*/site-packages/torchaudio/lib/*.so; \
	  $(PY) -m pip uninstall -q -y torchvision torchcodec 2>/dev/null; \
	  $(PY) -c "import torchaudio, transformers"; }
	@touch $@

clean:
	rm -rf $(VENV) .cache out
